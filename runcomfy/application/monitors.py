"""
Somebody who looks at a machine without working on it: `comfyctl dev monitor`.

It is written down like a job's use, so that the guard does not end an idle dev server under the eyes of its user; but
it keeps nobody else from ending or replacing the machine.
"""

from __future__ import annotations

from typing import Final

from runcomfy.domain.lease import Use
from runcomfy.domain.machine import OwnerId

_MONITOR: Final = "monitor:"


def monitor_id(owner_id: OwnerId) -> str:
    """Return what a use is called that only looks."""
    return f"{_MONITOR}{owner_id}"


def looks_only(use: Use) -> bool:
    """Whether the use is no job."""
    return use.job_id.startswith(_MONITOR)
