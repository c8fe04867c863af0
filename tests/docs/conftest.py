"""Pages with generated parts: compared with what the code says now, or written anew with UPDATE_DOCS=1."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Protocol

import pytest

ROOT = Path(__file__).resolve().parents[2]
ADVICE = "run the tests in tests/docs once with UPDATE_DOCS=1 and look at the difference"


class KeepCurrent(Protocol):
    def __call__(self, page: str, text: str, *, part: str | None = None) -> None: ...


@pytest.fixture(scope="session")
def keep_current() -> KeepCurrent:
    """Compare a page below docs/, or the part of it between its two marks, with what was generated."""

    def keep(page: str, text: str, *, part: str | None = None) -> None:
        path = ROOT / "docs" / page
        now = path.read_text(encoding="utf-8") if path.exists() else ""
        wanted = text.rstrip() + "\n"
        if part is not None:
            marks = re.compile(
                rf"(<!-- generated: {part}\b[^\n]*-->\n)(.*?)(<!-- end of generated: {part} -->)", re.DOTALL
            )
            found = marks.findall(now)
            assert len(found) == 1, f"{page} has no place marked for {part}"
            wanted = marks.sub(lambda match: f"{match[1]}\n{wanted}\n{match[3]}", now)
        if os.environ.get("UPDATE_DOCS"):
            path.write_text(wanted, encoding="utf-8")
            return
        assert now == wanted, ADVICE

    return keep
