"""The verbs: what is done with jobs and machines. Knows ports and domain only."""
