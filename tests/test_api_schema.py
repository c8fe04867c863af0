"""The API against its own document: whatever is sent, no answer is a defect, and each is one that was announced."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from runcomfy.testing.clock import LoopClock
from runcomfy.testing.web import Web, serving_web

pytestmark = pytest.mark.looptime(False)

CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
NOT_HERE = ("/shutdown", "/events", "/")
"""Ends the server; never ends; the page."""
WAITS = ("/flux/", "/partpacker/", "/serverless/", "/local_comfyui/", "/blender/", "/process_", "/execute_")
"""CONJURE's endpoints that answer when a picture is there: nobody makes one here."""


def picture() -> dict[str, Any]:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 5}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "out"}},
    }


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """The API in a thread of its own, with nobody who works: what is put in waits."""
    folder: Path = tmp_path_factory.mktemp("schema")
    ready: Future[tuple[Web, Callable[[], object]]] = Future()

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        try:
            # A thread has its own moments: the clock follows this loop's time, as the store's threads do.
            clock = LoopClock.following_the_wall()
            async with serving_web(folder, clock, max_per_minute=100_000, max_waiting=100_000) as web:
                await web.post("/jobs", {"workflow": picture()})
                ready.set_result((web, lambda: loop.call_soon_threadsafe(stop.set)))
                await stop.wait()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNCOMFY_STATE_DIR", str(folder / "state"))
        patch.setenv("RUNCOMFY_CREDENTIALS_FILE", "/dev/null")
        patch.chdir(folder)  # CONJURE's files lie where the server was started
        thread = threading.Thread(target=lambda: asyncio.run(serve()), name="api")
        thread.start()
        found, end = ready.result(timeout=60)
        yield found
        end()
        thread.join(timeout=60)


def test_every_answer_is_one_that_the_document_announces(web: Web) -> None:
    headers = {"Authorization": f"Bearer {web.token}"}
    schema = schemathesis.openapi.from_url(f"{web.address}/openapi.json", headers=headers)
    seen, wrong = [], []
    operations: list[Any] = list(schema.get_all_operations())
    for found in operations:
        operation = found.ok()
        if operation.path in NOT_HERE or operation.path.startswith(WAITS) or operation.path.endswith("/events"):
            continue
        seen.append(operation.label)
        try:
            _try(operation, headers)
        except FailureGroup as error:
            wrong += [f"{operation.label}: {failure}" for failure in error.exceptions]
    assert not wrong, "\n\n".join(wrong)
    assert len(seen) > 25, seen


def _try(operation: Any, headers: dict[str, str]) -> None:
    @given(case=operation.as_strategy(), job=st.sampled_from(["1", "0", "nothing", "0" * 201, None]))
    @settings(
        max_examples=10,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any, job: str | None) -> None:
        if job is not None and "job_id" in (case.path_parameters or {}):
            case.path_parameters["job_id"] = job
        assert case.call_and_validate(headers=headers, checks=CHECKS).status_code != 500

    check()
