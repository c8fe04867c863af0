"""A serverless deployment: requests that RunComfy queues, runs and bills by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from runcomfy.domain.serverless import (
    DeploymentView,
    Overrides,
    RemoteFile,
    RequestReport,
    RequestResult,
    Submitted,
)
from runcomfy.ports.comfyui import Fetched


class Serverless(Protocol):
    """One deployment."""

    async def submit(self, overrides: Overrides | None = None, *, graph: Mapping[str, Any] | None = None) -> Submitted:
        """Ask once for one run and return its ids.

        `overrides` are laid over the deployment's saved graph; `graph` is a whole one to run in its place (its nodes
        and models must be in the deployment's image).

        There is neither a key that makes a submit repeatable nor a list of requests to look it up in. So it is sent
        again only where it cannot have arrived; RequestUnclear says that it may have. Every other error means that
        nothing runs: OutOfCredit, DeploymentUnusable, ValueInvalid, AuthRejected, RateLimited, ProviderBusy …
        """
        ...

    async def status(self, request: Submitted) -> RequestReport:
        """Return where the request stands. Raises RequestNotFound, ProviderBusy, AnswerUnreadable, AuthRejected …"""
        ...

    async def result(self, request: Submitted) -> RequestResult:
        """Return the result as far as there is one. Raises as `status`."""
        ...

    async def cancel(self, request: Submitted) -> bool:
        """Ask for the request to end; True: accepted, False: it was over already, or is not known. Repeatable."""
        ...

    async def fetch(self, file: RemoteFile, destination: str) -> Fetched:
        """Download a file to the new file `destination`; nothing is left there if an error is raised.

        The token is not sent. Raises OutputMissing, DownloadFailed, DiskFull, LocalError.
        """
        ...

    async def deployment(self) -> DeploymentView | None:
        """Return what RunComfy says about the deployment; None if it says nothing that can be read.

        Raises DeploymentUnusable (not known), AuthRejected, AccessDenied.
        """
        ...
