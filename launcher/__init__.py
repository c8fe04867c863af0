"""The application around the library: generation services, the HTTP API and the page in the browser."""

from pkgutil import extend_path

# CONJURE keeps a folder `launcher/` of its own without an `__init__.py`. A regular package would hide the modules in
# it; extending the path lets both be found.
__path__ = extend_path(__path__, __name__)
