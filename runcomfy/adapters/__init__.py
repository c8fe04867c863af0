"""The outside, one room per port. Adapters keep the ports' contracts and do not know each other."""
