"""A broken invariant, and the list of them that one day makes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Violation:
    """An invariant that did not hold."""

    invariant: str
    """`I1` to `I25`."""
    what: str
    """What was seen, in a sentence."""
    subject: str = ""
    """The job, machine or prompt whose story tells it; empty: none of them."""
    at: float = 0.0
    """Second of the day."""

    def __str__(self) -> str:
        """Return the violation as it is printed."""
        return f"{self.invariant}: {self.what}{f' [{self.subject}]' if self.subject else ''}"


class Found:
    """Violations in the order in which they were seen, each once."""

    def __init__(self) -> None:
        self.all: list[Violation] = []
        self._known: set[tuple[str, str, str]] = set()

    def add(self, invariant: str, what: str, subject: str = "", *, at: float = 0.0, mark: str = "") -> None:
        """Add one; of several with the same invariant, subject and mark the first counts."""
        known = invariant, subject, mark or what
        if known not in self._known:
            self._known.add(known)
            self.all.append(Violation(invariant, what, subject, at))
