"""
The queue's doors for `python -m`: what they lead to is in `runcomfy.cli`.

A project folder has a `comfyui_agent/` of its own, for its `config/`, without an `__init__.py`: it hides nothing of
this package, because Python prefers a folder with an `__init__.py` wherever on the path it stands.
"""
