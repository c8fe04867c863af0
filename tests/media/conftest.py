"""What the tests of results ask: what some bytes are found to be, and why they are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runcomfy.adapters import media
from runcomfy.domain.exceptions import OutputCorrupt
from runcomfy.domain.job import OutputKind
from runcomfy.ports.results import Media

LIMIT = 250_000_000

Inspect = Callable[..., Media]


@pytest.fixture
def inspect(tmp_path: Path) -> Inspect:
    """Inspect some bytes as a result."""

    def run(content: bytes, expected: OutputKind | None = None, **options: Any) -> Media:
        path = tmp_path / "result"
        path.write_bytes(content)
        return media.inspect(path, **{"max_pixels": LIMIT, "expected": expected} | options)

    return run


@pytest.fixture
def refusal(inspect: Inspect) -> Callable[..., str]:
    """Return why some bytes are refused."""

    def run(content: bytes, expected: OutputKind | None = None, **options: Any) -> str:
        with pytest.raises(OutputCorrupt) as caught:
            inspect(content, expected, **options)
        assert caught.value.hint
        assert caught.value.exit_code == 7
        return caught.value.message

    return run
