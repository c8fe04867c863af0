"""The rules: pure values and functions. No await, no clock, no file, no log in this room."""
