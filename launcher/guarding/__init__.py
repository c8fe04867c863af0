"""Who may ask what: token, sessions, Host and Origin, limits."""
