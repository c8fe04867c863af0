"""Public door: the dev server's published state. It lives in `runcomfy.adapters.dev_server_state`.

What CONJURE does with it (health, costs, cleaning up) lives in `runcomfy.conjure.dev_server_state`.
"""

from runcomfy.adapters.dev_server_state import DevServerState
from runcomfy.conjure.dev_server_state import (
    DevServerStateManager,
    dev_server_state,
    get_active_server,
    has_active_dev_server,
    validate_dev_server,
)

__all__ = [
    "DevServerState",
    "DevServerStateManager",
    "dev_server_state",
    "get_active_server",
    "has_active_dev_server",
    "validate_dev_server",
]
