"""What happened in a simulated day: a line per event, that can be read as the story of a job or a machine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class Line:
    """One event."""

    at: float
    """Seconds since the day began."""
    who: str
    sentence: str
    job: str | None
    machine: str | None

    def __str__(self) -> str:
        """Return the line as it is printed."""
        days, rest = divmod(self.at, 86_400)
        hours, rest = divmod(rest, 3_600)
        minutes, seconds = divmod(rest, 60)
        day = f"{int(days)}d " if days else ""
        subject = " ".join(f"[{name}]" for name in (self.job, self.machine) if name)
        return (
            f"{day}{int(hours):02}:{int(minutes):02}:{seconds:06.3f} {self.who:<10} {self.sentence} {subject}".rstrip()
        )


class Trace:
    """Every event of one day, in order. Nothing in it depends on anything but the seed."""

    def __init__(self, now: Callable[[], float]) -> None:
        """`now` is asked for the seconds since the day began."""
        self._now = now
        self.lines: list[Line] = []
        self._hidden: list[tuple[str, str]] = []

    def hide(self, text: str, word: str) -> None:
        """Write `word` where `text`, which is another one in each run, would stand: the name of a temporary folder."""
        self._hidden.append((text, word))

    def tell(self, who: str, sentence: str, *, job: str | None = None, machine: str | None = None) -> None:
        """Note an event; `job` and `machine` are the names by which its story is found."""
        for text, word in self._hidden:
            sentence = sentence.replace(text, word)
        self.lines.append(Line(self._now(), who, sentence, job, machine))

    def story(self, subject: str, *, before: timedelta = timedelta(minutes=1)) -> list[str]:
        """Return the lines that concern a job or machine, with what went wrong everywhere while it lived.

        A line concerns it if it says so or has its name in the sentence.
        """
        own = [line for line in self.lines if subject in (line.job, line.machine) or subject in line.sentence]
        if not own:
            return []
        first, last = own[0].at - before.total_seconds(), own[-1].at
        mine = {id(line) for line in own}
        return [
            str(line)
            for line in self.lines
            if id(line) in mine or (line.who in ("fault", "world") and first <= line.at <= last)
        ]

    def text(self) -> Iterator[str]:
        """Yield every line."""
        return map(str, self.lines)

    @property
    def digest(self) -> str:
        """A number for the whole of it: two runs of one seed have the same."""
        digest = hashlib.sha256()
        for line in self.text():
            digest.update(line.encode())
            digest.update(b"\n")
        return digest.hexdigest()
