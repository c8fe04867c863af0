"""Public door: the dev server's published state. It lives in `runcomfy.adapters.dev_server_state`."""

from runcomfy.adapters.dev_server_state import DevServerState, DevServerStateManager

__all__ = ["DevServerState", "DevServerStateManager"]
