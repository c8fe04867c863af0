"""
What is known of a job while it runs, for its result whatever happens: times, what ran when, where, what is owed.

The orchestrator fills it; nothing here waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from runcomfy.application.faultpoints import faultpoint
from runcomfy.application.journal import Journal
from runcomfy.application.own_machine import total_of
from runcomfy.application.placing import Place, Show
from runcomfy.domain.altered import replace
from runcomfy.domain.job import BillLine, JobId, Output, PromptId
from runcomfy.domain.progress import Progress
from runcomfy.domain.timeline import Timeline


@dataclass(slots=True)
class RunRecord:
    """What is known of a job while it runs, for its result whatever happens."""

    job_id: JobId
    on_progress: Show | None
    started: float
    journal: Journal
    drawn_for: PromptId
    """The prompt id whose seeds the workflow was bound with."""
    seeds: Mapping[str, int] = field(default_factory=dict)
    prompt_id: PromptId | None = None
    outputs: tuple[Output, ...] = ()
    folder: str | None = None
    bill: tuple[BillLine, ...] = ()
    earlier: tuple[BillLine, ...] = ()
    """What earlier attempts of the job have cost."""
    timings: dict[str, float] = field(default_factory=dict)
    place: Place | None = None
    joined: bool = False
    """Whether the prompt of an earlier attempt is gone on with."""
    timeline: Timeline = field(default_factory=Timeline)
    _step: str | None = None
    _since: float = 0.0

    @property
    def server_type(self) -> str:
        """The type of the rented machine the job is at, or was; empty on a server that was given."""
        machine = self.place.machine if self.place is not None else None
        return machine.server_type if machine is not None else ""

    def show(self, progress: Progress) -> None:
        """Take a snapshot, and pass it on with the time since the job began and the machine's type."""
        seconds = asyncio.get_running_loop().time() - self.started
        elapsed = timedelta(seconds=seconds)
        progress = replace(progress, elapsed=elapsed, server_type=self.server_type, joined=self.joined)
        if self.earlier:
            progress = replace(progress, earlier_usd=total_of(self.earlier))
        self.timeline = self.timeline.seen(progress, seconds)
        if self.on_progress is not None:
            self.on_progress(progress)

    def step(self, name: str) -> None:
        """Begin a step; the one before ends here."""
        now = asyncio.get_running_loop().time()
        if self._step is not None:
            self.timings[self._step] = self.timings.get(self._step, 0.0) + now - self._since
        self._step, self._since = name, now
        faultpoint(f"job.{name}")

    def name_prompt(self, prompt_id: PromptId) -> None:
        """Take the id under which the server has the prompt, or will have it."""
        self.prompt_id = prompt_id

    def owe(self, bill: tuple[BillLine, ...]) -> None:
        """Take the bill of a machine that was rented for this job."""
        self.bill = bill

    def end(self) -> None:
        """End the last step and take the total."""
        self.step("")
        self.timings.pop("", None)
        self._step = None
        self.timings["total"] = asyncio.get_running_loop().time() - self.started
