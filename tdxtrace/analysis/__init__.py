"""From events to findings: one module per question, named as the table it returns."""
