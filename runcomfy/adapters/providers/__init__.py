"""Clouds that rent machines."""
