"""Shipped for our tests, users' tests and the demo: emulators of the clouds and of ComfyUI."""
