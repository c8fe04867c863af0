"""`GET /metrics`: what a Prometheus reads. Counts and sums only: no names of users, no prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated

from fastapi import APIRouter, Depends, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from launcher.backend import Backend, backend_of

router = APIRouter(tags=["service"])


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(backend: Annotated[Backend, Depends(backend_of)]) -> Response:
    """How many jobs wait, run and have ended, machines, money, listeners and requests, for a Prometheus."""
    registry = CollectorRegistry()
    counts = await backend.queue.counts()
    jobs = GaugeMetricFamily("comfyctl_jobs", "Jobs of the queue by status.", labels=["status"])
    for status, count in counts.items():
        jobs.add_metric([str(status)], count)
    registry.register(_Known([jobs]))  # type: ignore[arg-type]
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _Known:
    """Metrics that are known already."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)
