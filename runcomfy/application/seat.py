"""
A job's seat at its place, as the job sees it: whoever runs a prompt says here when the server computes it.

At most places nothing follows from that; a machine of the pool frees the seat for the next job (`pool_station`), and a
rented machine's time is written down (`work_book`).
"""

from __future__ import annotations

from collections.abc import Callable

from runcomfy.domain.job import PromptId
from runcomfy.domain.progress import QueueView


class Seat:
    """A seat where nobody waits for anybody."""

    async def line_up(self) -> None:
        """Return when the prompt may be sent: those who came before have sent theirs, or take too long."""

    def submitted(self, prompt_id: PromptId) -> None:
        """Say that the server has the prompt."""

    def saw(self, queue: QueueView) -> None:
        """Say what was in the server's queue just now."""

    def computing(self) -> None:
        """Say that the server computes the prompt now. Harmless when repeated."""

    def computed(self, seconds: float | None = None) -> None:
        """Say that it does not any more, well or not; it took `seconds`, if known. Harmless when repeated."""

    @property
    def behind(self) -> bool:
        """Whether the prompt waits its turn behind one of ours, or will."""
        return False

    @property
    def waited(self) -> bool:
        """Whether the seat was lost before its turn came: what ended there was not this job's doing."""
        return False

    @property
    def unpaid(self) -> bool:
        """Whether the machine was ended under the job because a budget pays no longer."""
        return False

    @property
    def flapped(self) -> bool:
        """Whether the machine is there and was not Ready for a while, so that the seat is void."""
        return False

    @property
    def outran(self) -> bool:
        """Whether the machine went away because its lease was over: the job needs longer than it was paid ahead."""
        return False

    @property
    def void(self) -> bool:
        """Whether the seat is lost: nothing that is on the server can be relied on."""
        return False

    @property
    def server_gone(self) -> bool:
        """Whether the server is known to exist no more."""
        return False

    @property
    def server_stays(self) -> bool:
        """Whether the server will be there for another attempt, as far as its keeper knows."""
        return True

    async def settled(self) -> None:
        """Return when what is known of it is written down, or could not be."""

    def at_turn(self, listener: Callable[[], None]) -> None:
        """Call `listener` when nobody of ours is ahead any more; at once if nobody is."""
        listener()
