"""What the application asks of the outside, as Protocols; each method states its contract."""
