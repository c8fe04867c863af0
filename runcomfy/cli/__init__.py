"""The command line: a file per noun. A command parses, calls one application method, prints."""
