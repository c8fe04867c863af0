"""The routes of the HTTP API, a module per noun; each has a `router`."""
