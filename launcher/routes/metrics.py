"""
`GET /metrics`: what a Prometheus reads.

Counts and sums only: no names of users, projects or jobs, no prompts, no ids, so that the number of series is bounded
and whoever may read the metrics learns nothing of whom. What cannot be read now (no account, a database that refuses)
is left out, and `comfyctl_readable` says so.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launcher.backend import Backend, backend_of
from launcher.glances import ALL
from launcher.schemas import problems
from launcher.teller import teller_of
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.domain.queued import QueueStatus

router = APIRouter(tags=["service"])

METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
BUCKETS: Final = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0)
"""Seconds. CONJURE's calls wait for a job, up to 300 s."""
PARTS: Final = ("http", "queue", "pool")


class Figures(Collector):
    """What one service counts, and what it reads when it is asked."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._read: list[Metric] = []
        self._reading = asyncio.Lock()
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "comfyctl_http_requests", "HTTP requests.", ["method", "route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "comfyctl_http_request_seconds",
            "How long requests took; event streams are left out.",
            ["route"],
            registry=self.registry,
            buckets=BUCKETS,
        )
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Return what was read last."""
        return iter(self._read)

    async def text(self) -> bytes:
        """Read everything and return it as Prometheus takes it."""
        async with self._reading:
            readable = {}
            found = [*self._service()]
            for name, read in (("queue", self._queue), ("machines", self._machines), ("money", self._money)):
                try:
                    metrics = await read()
                except RunComfyError:
                    readable[name] = 0
                else:
                    readable[name] = 0 if metrics is None else 1
                    found += metrics or ()
            said = GaugeMetricFamily("comfyctl_readable", "Whether it could be read now.", labels=["what"])
            for name, yes in readable.items():
                said.add_metric([name], yes)
            self._read = [*found, said]
            return generate_latest(self.registry)

    def _service(self) -> Iterator[Metric]:
        backend = self._backend
        info = GaugeMetricFamily("comfyctl_info", "The running version.", labels=["version"])
        info.add_metric([_version()], 1)
        yield info
        parts = GaugeMetricFamily("comfyctl_part", "What works in this process.", labels=["part"])
        for part in PARTS:
            parts.add_metric([part], int(part in backend.parts))
        yield parts
        yield _gauge("comfyctl_live_jobs", "Jobs that run in this process now.", len(backend.app.live.jobs()))
        yield _gauge("comfyctl_listeners", "Clients that listen to events now.", backend.hub.listening)

    async def _queue(self) -> list[Metric]:
        counts = await self._backend.queue.counts()
        jobs = GaugeMetricFamily("comfyctl_jobs", "Jobs of the queue by status.", labels=["status"])
        for status in QueueStatus:
            jobs.add_metric([status.value], counts.get(status, 0))
        workers = len(await self._backend.queue.workers())
        return [jobs, _gauge("comfyctl_workers", "Executors that live, in any process.", workers)]

    async def _machines(self) -> list[Metric] | None:
        said = await teller_of(self._backend.app).machines()
        if not said.get("listed"):
            return None
        counted: dict[tuple[str, str], int] = {}
        usd = 0.0
        for machine in said.get("machines", ()):
            key = str(machine.get("state")), str(machine.get("server_type"))
            counted[key] = counted.get(key, 0) + 1
            usd += _number(machine.get("usd_per_hour")) or 0.0
        metric = GaugeMetricFamily("comfyctl_machines", "Machines of the account.", labels=["state", "server_type"])
        for labels, count in sorted(counted.items()):
            metric.add_metric(list(labels), count)
        return [metric, _gauge("comfyctl_machines_usd_per_hour", "What they cost together, in USD per hour.", usd)]

    async def _money(self) -> list[Metric]:
        said = await teller_of(self._backend.app).money()
        spent = GaugeMetricFamily("comfyctl_spent_usd", "Spent so far, in USD, by the ledger.", labels=["window"])
        for window in ("today", "month"):
            usd = _number(_mapping(said.get(window)).get("usd"))
            if usd is not None:
                spent.add_metric([window], usd)
        metrics: list[Metric] = [spent]
        committed = _number(said.get("committed_usd"))
        if committed is not None:
            metrics.append(_gauge("comfyctl_committed_usd", "What machines that run may still cost.", committed))
        budgets = GaugeMetricFamily("comfyctl_budget_usd", "Budgets of the account.", labels=["budget", "what"])
        for budget in said.get("budgets", ()):
            if budget.get("scope") != ALL:
                continue  # somebody's name
            for what in ("hard", "soft", "spent", "committed", "left"):
                usd = _number(budget.get(what))
                if usd is not None:
                    budgets.add_metric([str(budget.get("name")), what], usd)
        return [*metrics, budgets]


class Measured:
    """Counts requests by the route that answered them, never by their path."""

    def __init__(self, app: ASGIApp, figures: Figures) -> None:
        self._app, self._figures = app, figures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        began, status = loop.time(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", None) or "none"
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._figures.requests.labels(method, route, str(status)).inc()
            if not route.endswith("/events"):
                self._figures.seconds.labels(route).observe(loop.time() - began)


def install_metrics(web: FastAPI, backend: Backend) -> None:
    """Count the requests of an application."""
    figures = Figures(backend)
    web.state.figures = figures
    web.add_middleware(Measured, figures=figures)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **problems()})
async def metrics(request: Request, _: Annotated[Backend, Depends(backend_of)]) -> Response:
    """How many jobs wait, run and have ended, machines, money, listeners and requests, for a Prometheus."""
    figures: Figures = request.app.state.figures
    return Response(await figures.text(), media_type=CONTENT_TYPE_LATEST)


def _gauge(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(name, words, value=value)


def _number(said: Any) -> float | None:
    try:
        number = float(said)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _mapping(said: Any) -> Mapping[str, Any]:
    return said if isinstance(said, Mapping) else {}


def _version() -> str:
    try:
        return version("runcomfy-orchestrator")
    except PackageNotFoundError:
        return "unknown"
