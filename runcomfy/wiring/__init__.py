"""How a process is put together: rooms of `runcomfy.bootstrap`, which names the result."""
