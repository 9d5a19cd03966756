"""The guest: programs as streams of steps, and the vCPU that executes them."""
