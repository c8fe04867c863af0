"""
Which generation mode holds: what the state file says, if it is one.

CONJURE's launcher writes the mode into `generation_mode` of the state file. Its Blender add-on writes `standard` or
`turbo`, which are choices of another pipeline, into the same key. Those end nothing here: the last mode that was one
goes on to hold, or the one that is configured (`CONJURE_GENERATION_MODE`, else `local`), and `/mode` says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from launcher.conjure.services import MODES
from runcomfy.domain.exceptions import foreign_text

KEY: Final = "generation_mode"
VARIABLE: Final = "CONJURE_GENERATION_MODE"
DEFAULT: Final = "local"
ANOTHER_PIPELINES: Final = frozenset({"standard", "turbo"})


@dataclass(frozen=True, slots=True)
class Mode:
    """The mode that holds, and why it is not what the state file says, if it is not."""

    name: str
    note: str = ""


class ModeMemory:
    """Remembers the last mode that was one."""

    def __init__(self) -> None:
        self._last = ""

    def of(self, state: Mapping[str, Any]) -> Mode:
        """Return the mode that holds by this state."""
        written = state.get(KEY)
        if isinstance(written, str) and written in MODES:
            self._last = written
            return Mode(written)
        if written is None:  # CONJURE has a default for that; going on in a mode that costs money is not it
            return Mode(configured())
        fallback = self._last or configured()
        shown = foreign_text(written, 60)
        elsewhere = isinstance(written, str) and written in ANOTHER_PIPELINES
        reason = "is a choice of the multi-view pipeline" if elsewhere else "is not a mode"
        return Mode(fallback, f"{KEY} in the state file is {shown!r}, which {reason}; {fallback} goes on to hold")


def configured() -> str:
    """Return the mode that is configured."""
    found = os.environ.get(VARIABLE, "").strip().lower()
    return found if found in MODES else DEFAULT
