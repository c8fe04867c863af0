"""Every target, and the corpus that belongs to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.fuzzing import clouds, files, machines, requests, sessions, states, texts
from benchmarks.fuzzing.target import Target

CORPUS: Final = Path(__file__).resolve().parents[2] / "tests" / "fuzz" / "corpus"
TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for module in (clouds, machines, sessions, texts, states, files, requests)
    for target in module.TARGETS
}


def kept(target: Target) -> Iterator[tuple[str, bytes]]:
    """Yield (name, input) of what is kept in the repository for a target."""
    folder = CORPUS / target.name
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        yield path.name, path.read_bytes()


def beginnings(target: Target) -> list[tuple[str, bytes]]:
    """Return what inputs are grown from: the kept ones, and those made anew from what the repository has."""
    return [*kept(target), *((name, data[: target.max_bytes * 4]) for name, data in target.seeds())]
