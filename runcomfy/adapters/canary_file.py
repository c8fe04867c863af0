"""What the last canary of an account has found out, kept in the state folder for `comfyctl doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from runcomfy.adapters.files import make_private_dir, open_regular, write_atomically
from runcomfy.domain.canary import Outcome

_MAX_BYTES: Final = 64 * 1024
_MOST_DIGITS: Final = 30


def canary_file(state_dir: str, account: str) -> Path:
    """Return where it is kept."""
    return Path(state_dir) / f"canary-{account}.json"


def keep_outcome(state_dir: str, account: str, outcome: Outcome) -> Path:
    """Write it down and return where. Raises LocalError."""
    path = canary_file(state_dir, account)
    make_private_dir(path.parent)
    write_atomically(path, json.dumps(outcome.as_dict(), indent=2) + "\n")
    return path


def last_outcome(state_dir: str, account: str) -> Outcome | None:
    """Return the last one; None if there is none, or it cannot be read."""
    try:
        with open_regular(canary_file(state_dir, account)) as file:
            outcome = Outcome.from_dict(json.loads(file.read(_MAX_BYTES)))
        return outcome if outcome.cost_usd.is_finite() and abs(outcome.cost_usd.adjusted()) <= _MOST_DIGITS else None
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError):
        return None
