"""The same call, made again while it runs, is one piece of work, however long threads take for anything."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from launcher.conjure.engine import WATCHED, DirectEngine, Shared
from launcher.conjure.services import LocalComfyUIService
from runcomfy.bootstrap import App
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator

PATIENCE = 30.0


class Holding(ThreadPoolExecutor):
    """Worker threads that do not begin the second of certain tasks before they are let go on."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(8)
        self._names, self._seen = names, 0
        self.go_on = threading.Event()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """As executors do; `asyncio.to_thread` hands in a partial of the function."""
        asked = fn.args[0] if isinstance(fn, partial) and fn.args else fn
        if getattr(asked, "__name__", "") in self._names:
            self._seen += 1
            if self._seen == 2:
                return super().submit(self._later, fn, *args, **kwargs)
        return super().submit(fn, *args, **kwargs)

    def _later(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.go_on.wait(PATIENCE)
        return fn(*args, **kwargs)


@pytest_asyncio.fixture
async def engine(conjure_project: Path, own_comfyui: ComfyUIEmulator, clock: LoopClock) -> AsyncIterator[DirectEngine]:
    async with App(clock=clock, queue={"api_base_url": own_comfyui.url}) as app:
        yield DirectEngine(app)


RENDER = "data/generated_images/gestureCamera/render.png"
CALLS: dict[str, Callable[[LocalComfyUIService], Any]] = {
    "depth": lambda service: service.a_generate_flux_depth_image(RENDER, "a fox", 7),
    "model": lambda service: service.a_generate_3d_model(RENDER, 7),
    "unified": lambda service: service.a_generate_flux_mesh_unified(seed=7),
}


@pytest.mark.looptime(False)  # virtual time waits for threads
@pytest.mark.parametrize("held", [{"snapshot"}, {"sweep"}, {"user_prompt"}])
@pytest.mark.parametrize("call", CALLS)
async def test_a_second_call_whose_thread_is_slower_than_the_whole_first_one_joins_it(
    conjure_project: Path, call: str, held: set[str]
) -> None:
    threads = Holding(held)
    asyncio.get_running_loop().set_default_executor(threads)
    async with ComfyUIEmulator(speed=1_000) as comfyui, App(queue={"api_base_url": comfyui.url}) as app:
        service = LocalComfyUIService(DirectEngine(app))
        first, second = (asyncio.create_task(CALLS[call](service)) for _ in range(2))
        first.add_done_callback(lambda _: threads.go_on.set())
        made = await asyncio.gather(first, second)
        assert made[0]["success"] is True
        assert made[0] == made[1]
        assert len(comfyui.run_log) == 1


async def test_another_picture_at_the_same_place_is_another_call(
    engine: DirectEngine, own_comfyui: ComfyUIEmulator, conjure_project: Path
) -> None:
    service = LocalComfyUIService(engine)
    first = asyncio.create_task(CALLS["depth"](service))
    await asyncio.sleep(2)
    render = conjure_project / RENDER
    changed = await asyncio.to_thread(render.read_bytes)
    await asyncio.to_thread(render.write_bytes, changed + b"\0")  # the same picture, and not the same bytes
    made = await asyncio.gather(first, CALLS["depth"](service))
    assert made[0]["job_id"] != made[1]["job_id"]
    assert len(own_comfyui.run_log) == 2


async def test_who_asks_while_the_work_ends_because_nobody_wanted_it_begins_anew(engine: DirectEngine) -> None:
    ending, ended = asyncio.Event(), asyncio.Event()

    async def work() -> str:
        try:
            await asyncio.sleep(3_600)
        except asyncio.CancelledError:
            ending.set()
            await ended.wait()  # a machine is being stopped
            raise
        return "never"

    async def other() -> str:
        return "anew"

    leaves = asyncio.create_task(engine.once("key", work))
    await asyncio.sleep(1)
    leaves.cancel()
    await ending.wait()
    assert await engine.once("key", other) == "anew"
    ended.set()
    with pytest.raises(asyncio.CancelledError):
        await leaves


async def test_everybody_who_waits_learns_the_job(engine: DirectEngine) -> None:
    """However many pieces of shared work lie between a caller and the job, and whenever they came."""
    begun, done = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        engine.accepted("job-1")
        begun.set()
        await done.wait()

    async def caller(name: str) -> str:
        watched: list[Shared] = []
        WATCHED.set(watched)
        waiting = asyncio.create_task(engine.once(name, lambda: engine.once("inner", work)))
        await begun.wait()
        await asyncio.sleep(1)
        known = watched[0].job_id
        done.set()
        await waiting
        return known

    first = asyncio.create_task(caller("one"))
    await begun.wait()
    assert set(await asyncio.gather(first, caller("one"), caller("two"))) == {"job-1"}
