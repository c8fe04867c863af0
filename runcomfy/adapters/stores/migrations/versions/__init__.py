"""Numbered changes of the database. Only ever added to, and only ever forward."""
