"""
One ComfyUI server, wherever it runs.

Every method may raise `ServerUnreachable` (no answer within the adapter's own retries; worth trying again) and
`NotComfyUI` (something else answers at that address). A lost socket is re-made by the adapter; what was missed while
it was down is lost, so the truth is asked for by `queue` and `history`, in that order.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from runcomfy.domain.job import FileRef, PromptId
from runcomfy.domain.progress import HistoryEntry, QueueView, ServerEvent

__all__ = ["ComfyUI", "Fetched", "HistoryEntry", "QueueView", "ServerInfo", "Submitted"]


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What kind of server answers. Cached per server process ("boot")."""

    version: str
    """As the server says it; empty if it does not."""
    interrupts_by_id: bool
    """`/interrupt` with a prompt id (since ComfyUI 0.3.57); older servers interrupt whoever runs."""
    cancels_jobs: bool
    """`/api/jobs/{id}/cancel` exists (since 0.26.0)."""
    max_upload_bytes: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    """GPU name and memory, for people."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """A prompt the server has accepted."""

    prompt_id: PromptId
    number: float | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that was downloaded whole."""

    size_bytes: int
    sha256: str


class ComfyUI(Protocol):
    """A client of one server. `close()` when done; usable by many jobs at once."""

    @property
    def masked_url(self) -> str:
        """The server's address, fit to be shown."""
        ...

    async def probe(self, *, fresh: bool = False) -> ServerInfo:
        """Ask what answers there: version and capabilities. Raises ServerTooOld (before 0.3.45)."""
        ...

    async def node_info(self, classes: Collection[str], *, fresh: bool = False) -> Mapping[str, Any]:
        """Return the node list's entries for these classes; classes the server does not have are left out.

        Cached; `fresh` asks again (a file list inside an entry may have changed).
        """
        ...

    async def class_names(self) -> Collection[str]:
        """Return every node class the server has (an expensive call for it; cached)."""
        ...

    async def upload(self, path: str, *, kind: str = "image") -> str:
        """Put a file into the server's input folder under a content-addressed name; return the name it got.

        Returns only when the server is seen to hold every byte. The same content is sent once per client.
        Raises InputFileMissing, InputFileInvalid (too large for this server).
        """
        ...

    def listen(self, prompt_id: PromptId) -> AbstractAsyncContextManager[AsyncIterator[ServerEvent]]:
        """Subscribe to what the socket says about one prompt, from before it is submitted until the block is left.

        The socket is connected before the block is entered if the server lets us; if not, the block is entered all
        the same and the events say so. The iterator never ends by itself and never raises for a lost connection.
        """
        ...

    def renew_socket(self, reason: str) -> None:
        """Say that polling knew more than the open socket did; it is closed and opened again, but not too often."""
        ...

    async def submit(self, graph: Mapping[str, Any], *, prompt_id: PromptId) -> Submitted:
        """Queue the graph under our own id, exactly once.

        After an answer that never came the queue and history are searched for the id before anything is sent again.
        Raises PromptRejected (with every node error; a prompt accepted only in part is taken back first).
        """
        ...

    async def queue(self) -> QueueView:
        """Read what runs and what waits. Concurrent readers share one request."""
        ...

    async def history(self, prompt_id: PromptId) -> HistoryEntry | None:
        """Read what the server remembers of a prompt; None while it has not ended (or was never heard of).

        Raises AnswerUnreadable; its details have `ended` true if the server does remember the prompt, which has ended
        then, and only what it says about it makes no sense.
        """
        ...

    async def cancel(self, prompt_id: PromptId, *, alone: bool) -> bool:
        """Take the prompt out of the queue or interrupt it; True if the server was told to.

        `alone` says that nobody else uses the machine: only then a server that cannot interrupt by id is told to
        interrupt whatever runs. Otherwise False.
        """
        ...

    async def withdraw(self, prompt_id: PromptId) -> bool:
        """Take a prompt that waits its turn out of the queue; one that has begun is left alone.

        True once it is proven to be neither in the queue nor in the history: it has not run, and never will. False if
        it runs or has ended. Repeating it is harmless.
        """
        ...

    async def fetch(self, file: FileRef, destination: str) -> Fetched:
        """Download a file whole to `destination` (a new file), resuming after cuts; its length is checked.

        Raises OutputMissing (the server does not have it), DownloadFailed, DiskFull.
        """
        ...

    async def close(self) -> None:
        """Close the socket and the connections. Harmless when repeated."""
        ...
