"""docs/performance.md is what the kept results say, and a result that is kept can be read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.__main__ import ALL
from benchmarks.common import Findings, shown
from benchmarks.performance import BENCHMARKS, PAGE, page
from benchmarks.results import Figure, Result, keep, kept

KeepCurrent = Callable[..., None]


def test_the_page_is_what_was_kept(keep_current: KeepCurrent) -> None:
    keep_current(PAGE.name, page(kept()))


def test_every_measurement_of_the_page_can_be_run() -> None:
    assert set(BENCHMARKS) <= set(ALL)


def test_what_is_kept_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    result = Result("queue", "make it", (Figure("claims", "4,000/s", "at least 4,000/s", True),), 1.5, ("It was.",))
    keep(result)
    (read,) = kept()
    assert (read.name, read.figures, list(read.notes), read.day != "") == (
        "queue",
        [*result.figures],
        ["It was."],
        True,
    )


def test_a_missed_bar_is_seen() -> None:
    found = Findings("queue", "A note.")
    found.at_most("a claim", 51.0, 50.0, "ms")
    found.at_least("claims", 4_149.4, 4_000, "/s")
    found.told("rows", 3)
    text = page([found.result()])
    assert "| `queue` | a claim | 51 ms | at most 50 ms | **missed** |" in text
    assert "| `queue` | claims | 4,149/s | at least 4,000/s | met |" in text
    assert "| rows | 3 |  |" in text
    assert "A note." in text
    assert "Not measured yet: `startup`" in text


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.0342, "", "0.034"),
        (0.34, "", "0.34"),
        (22.84, "ms", "22.8 ms"),
        (4149.4, "/s", "4,149/s"),
        (3.0, "MB", "3 MB"),
    ],
)
def test_figures_are_rounded_for_people(value: float, unit: str, words: str) -> None:
    assert shown(value, unit) == words
