"""What the real tools would have written: one module per format, from the kernel's formats."""
