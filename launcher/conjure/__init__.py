"""What CONJURE asks of its generation code: services, fixed file places, its state file."""
