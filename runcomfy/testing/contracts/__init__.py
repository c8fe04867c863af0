"""One behaviour suite per port, to run against any adapter that claims to keep it."""
