"""What `comfyctl serve` owes whoever pays: every machine billed once, every job's outcome told, no cut that costs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from runcomfy.application.service import ServeOptions
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.serving import Services

pytestmark = pytest.mark.cloud(boot_time=120)
SHORT = timedelta(minutes=2)


class _SlowToLeave:
    """Runs jobs that stay at their machine for a while after their result was committed."""

    def __init__(self, inner: Any, seconds: float) -> None:
        self._inner, self._seconds = inner, seconds

    async def run(self, request: Any, *, at: Any, **options: Any) -> Any:
        @asynccontextmanager
        async def lingering(**where: Any) -> AsyncIterator[Any]:
            async with at(**where) as place:
                yield place
                await asyncio.sleep(self._seconds)

        return await self._inner.run(request, at=lingering, **options)


async def test_a_job_whose_result_is_committed_is_done_whoever_looks_at_it_before_it_has_left(
    services: Services, cloud: RunComfyEmulator
) -> None:
    """The claim ends with the result; who looks at what is held then must not take that for a user's cancel."""
    async with services.start(works=False, max_machines=1, keep_alive=SHORT) as served:
        inner = served.app.orchestrator()
        served.app.orchestrator = lambda: _SlowToLeave(inner, 5.0)  # type: ignore[method-assign,assignment,return-value]
        served.begin(ServeOptions(once=True, guard=False))
        for number in range(4):
            await services.put(number, seconds=30)
        assert served.task is not None
        await served.task
    works = await services.books.works()
    assert Counter(work.outcome for work in works) == {"done": 4}
    assert await services.complaints() == []
