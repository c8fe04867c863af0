"""
The jobs of a simulated day, and the clients that put them in: what they were told is what the oracles hold us to.

Quiet hours and bursts, several users, priorities, long and short runs, results of several kinds; clients that change
their minds (cancel, retry), that do not know whether their request arrived (the same key again), and jobs that can
never work. Everything is drawn from the seed before the day begins, so that what goes wrong changes no job.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

from runcomfy.domain.exceptions import IdempotencyConflict, JobBusy, LocalError
from runcomfy.domain.job import JobRequest
from runcomfy.domain.queued import QueuedJob, QueueStatus, RowId
from runcomfy.testing.queue_programs import drawing
from runcomfy.testing.simulation.direction import direction_of

if TYPE_CHECKING:
    from runcomfy.testing.simulation.world import World

JOBS_A_DAY: Final = 44
BURSTS: Final = 6
USERS: Final = ("ann", "ben", "cat", "dan")
LENGTHS: Final = (8.0, 20.0, 45.0, 90.0, 180.0, 420.0)
"""Seconds that runs take."""
LENGTH_WEIGHTS: Final = (4, 6, 6, 4, 2, 1)
STUBBORN: Final = 25.0
"""Seconds after which a client that was not answered asks again."""
_NO_ROW: Final = RowId(0)
_LABEL: Final = re.compile(r"job-(\d+)\b")

Graph = dict[str, Any]


# -- graphs ----------------------------------------------------------------------------------------------------


def _saved(graph: Graph, number: int, node: str = "1", suffix: str = "") -> Graph:
    saver = {"class_type": "SaveImage", "inputs": {"images": [node, 0], "filename_prefix": f"job-{number}{suffix}"}}
    return {**graph, f"save{suffix}": saver}


def _picture(number: int, seconds: float) -> Graph:
    return drawing(seconds, number)


def _two_pictures(number: int, seconds: float) -> Graph:
    graph = drawing(seconds, number)
    other = {"class_type": "ProbeAsync", "inputs": {"steps": 1, "seconds_per_step": 1.0, "seed": number + 500_000}}
    return _saved({**graph, "3": other}, number, "3", "-b")


def _silent(number: int, seconds: float) -> Graph:
    graph = {"1": {"class_type": "ProbeBlock", "inputs": {"seconds": min(seconds, 300.0), "seed": number}}}
    return _saved(graph, number)


def _mesh(number: int, seconds: float) -> Graph:
    graph = drawing(seconds, number)
    save = {"class_type": "ProbeSaveGLB", "inputs": {"filename_prefix": f"job-{number}", "size": 1.0}}
    return {**graph, "3": save}


def _text(number: int, seconds: float) -> Graph:
    return {
        "0": {"class_type": "ProbeText", "inputs": {"text": f"job-{number} says hello", "send_frame": False,
                                                    "seconds": min(seconds, 500.0)}},
        "1": {"class_type": "SaveText", "inputs": {"text": ["0", 0], "filename_prefix": f"job-{number}",
                                                   "format": "txt"}},
    }  # fmt: skip


def _fails(number: int, seconds: float) -> Graph:
    burst = {"message": f"job-{number} burst", "kind": "RuntimeError", "after_steps": 1}
    return _saved({"1": {"class_type": "ProbeFail", "inputs": burst}}, number)


def _refused(number: int, seconds: float) -> Graph:
    return _saved({"1": {"class_type": "NodeThatNobodyHas", "inputs": {"seed": number}}}, number)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of job."""

    name: str
    graph: Callable[[int, float], Graph]
    extension: str
    weight: float
    works: bool = True
    """False: it can never be done."""
    runs: bool = True
    """False: no server may ever begin it."""


KINDS: Final[tuple[Kind, ...]] = (
    Kind("picture", _picture, ".png", 20),
    Kind("two pictures", _two_pictures, ".png", 4),
    Kind("silent", _silent, ".png", 3),
    Kind("picture and mesh", _mesh, ".png", 2),
    Kind("text", _text, ".txt", 2),
    Kind("fails", _fails, ".png", 2, works=False),
    Kind("refused", _refused, ".png", 1, works=False, runs=False),
)


def number_of(graph: Mapping[str, Any]) -> int | None:
    """Return which job of the day a graph belongs to, by what it says of itself; None: to none of them."""
    for node in graph.values():
        for name in ("filename_prefix", "text", "message"):
            found = _LABEL.match(str(node.get("inputs", {}).get(name, "")))
            if found is not None:
                return int(found[1])
    return None


# -- orders ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Order:
    """What one client wants, does, and was told."""

    number: int
    kind: Kind
    at: float
    """Seconds of the day."""
    seconds: float
    user: str
    priority: int
    retry_limit: int
    key: str | None = None
    again_after: tuple[float, ...] = ()
    """It is put in again under its key so long after it was accepted."""
    other_body_after: float | None = None
    """Somebody uses the key for another body so long after."""
    cancel_after: float | None = None
    retry_after: float | None = None
    """Whoever finds it failed so long after it was accepted lets it run again."""

    # what came of it
    row: RowId = _NO_ROW
    accepted_at: float | None = None
    """When the client was told that it is accepted."""
    cancelled_at: float | None = None
    """When the client was told that it is cancelled."""
    done_before_cancel: bool = False
    retried_at: list[float] = field(default_factory=list)
    complaints: list[tuple[str, str]] = field(default_factory=list)
    """Invariant and what was wrong with an answer."""
    target: Path = Path()

    @property
    def name(self) -> str:
        """The job's name in the queue, and in stories."""
        return f"job-{self.number}"

    @property
    def request(self) -> JobRequest:
        """What is asked for."""
        graph = self.kind.graph(self.number, self.seconds)
        return JobRequest(graph, out_file=str(self.target), user=self.user)


def orders(draw: Random, until: float, *, jobs: int | None = None) -> list[Order]:
    """Return everything that will be wanted before second `until`, in order. A whole day has `jobs` of them."""
    count = jobs if jobs is not None else max(1, round(JOBS_A_DAY * until / 86_400))
    times: list[float] = []
    bursts = [draw.uniform(0, until) for _ in range(max(1, round(BURSTS * until / 86_400)))]
    while len(times) < count:
        if draw.random() < 0.6:
            start = draw.choice(bursts)
            times += [start + draw.uniform(0, 90) for _ in range(draw.randint(1, 4))]
        else:
            times.append(draw.uniform(0, until))
    times = sorted(min(each, until) for each in times[:count])
    return [_order(draw, number, at) for number, at in enumerate(times, start=1)]


def _order(draw: Random, number: int, at: float) -> Order:
    kind = draw.choices(KINDS, [each.weight for each in KINDS])[0]
    order = Order(
        number,
        kind,
        at,
        seconds=draw.choices(LENGTHS, LENGTH_WEIGHTS)[0] * draw.uniform(0.8, 1.2),
        user=draw.choice(USERS),
        priority=draw.choice((50, 50, 50, 10, 90)),
        retry_limit=draw.choice((2, 2, 4, 6)),
    )
    chance = draw.random()
    if chance < 0.45:
        order.key = f"key-{number}"
        if draw.random() < 0.6:
            order.again_after = tuple(draw.choice((1.0, 40.0, 900.0, 7_200.0)) for _ in range(draw.randint(1, 2)))
        if draw.random() < 0.25:
            order.other_body_after = draw.choice((5.0, 600.0, 5_000.0))
    if draw.random() < 0.14:
        order.cancel_after = draw.choice((0.0, 30.0, 150.0, 240.0, 400.0, 1_200.0)) + draw.uniform(0, 30)
    if draw.random() < 0.3:
        order.retry_after = draw.uniform(2_400, 7_200)
    return order


async def feed(world: World, wanted: Iterable[Order] | None = None) -> None:
    """Put in the day's jobs, each when its time comes, and do what their clients do; returns when all is done."""
    if wanted is None:
        told = direction_of(world)
        wanted = orders(world.stream("load"), world.calm_at) if told is None else told.orders()
    async with asyncio.TaskGroup() as clients:
        for order in wanted:
            await asyncio.sleep(max(0.0, order.at - world.seconds))
            clients.create_task(_Client(world, order).live(), name=f"client of {order.name}")


class _Client:
    """Does what one order's client does."""

    def __init__(self, world: World, order: Order) -> None:
        self._world, self._order = world, order
        self._queue = world.services.queue

    async def live(self) -> None:
        world, order = self._world, self._order
        folder = Path(world.services.queue_settings.jobs_finished)
        order.target = folder / f"{order.name}{order.kind.extension}"
        job = await self._put()
        order.row, order.accepted_at = job.id, world.seconds
        world.acknowledged[order.name] = order
        world.tally.jobs += 1
        world.trace.tell(
            "client", f"is told that {order.kind.name} of {order.seconds:.0f} s is accepted", job=order.name
        )
        later = [(after, self._again) for after in order.again_after]
        if order.other_body_after is not None:
            later.append((order.other_body_after, self._other_body))
        if order.cancel_after is not None:
            later.append((order.cancel_after, self._cancel))
        if order.retry_after is not None:
            later.append((order.retry_after, self._retry))
        for after, act in sorted(later, key=lambda each: each[0]):
            wait = order.accepted_at + after - world.seconds
            if world.seconds + wait >= world.calm_at:
                return
            await asyncio.sleep(max(0.0, wait))
            await self._stubbornly(act)

    async def _put(self) -> QueuedJob:
        order = self._order

        async def put() -> QueuedJob:
            return await self._queue.enqueue(
                order.request,
                config_name=order.name,
                idempotency_key=order.key or f"only-{order.number}",
                priority=order.priority,
                user=order.user,
                retry_limit=order.retry_limit,
            )

        job: QueuedJob = await self._stubbornly(put)
        return job

    async def _stubbornly(self, act: Callable[[], Any]) -> Any:
        """Do it until it is answered: what it asks for may be asked for twice."""
        while True:
            try:
                return await act()
            except LocalError as error:
                self._world.trace.tell("client", f"is not answered: {error.message}", job=self._order.name)
                await asyncio.sleep(STUBBORN)

    async def _again(self) -> None:
        job = await self._put()
        if job.id != self._order.row:
            what = f"its key gave job {self._order.row}, and then job {job.id}"
            self._order.complaints.append(("I16", what))

    async def _other_body(self) -> None:
        order = self._order
        other = replace(order.request, workflow=_picture(order.number + 900_000, 1.0))
        try:
            await self._queue.enqueue(
                other, config_name=order.name, idempotency_key=order.key, priority=order.priority, user=order.user
            )
        except IdempotencyConflict:
            return
        order.complaints.append(("I16", "its key was taken for another body"))

    async def _cancel(self) -> None:
        job = await self._queue.cancel(self._order.row, by=self._order.user)
        if job.cancelled:
            self._order.cancelled_at = self._world.seconds
            self._world.trace.tell("client", "is told that it is cancelled", job=self._order.name)

    async def _retry(self) -> None:
        job = await self._queue.job(self._order.row)
        if job.status is not QueueStatus.FAILED or job.cancelled or not self._order.kind.works:
            return
        try:
            await self._queue.retry(job, by=self._order.user)
        except JobBusy:
            return  # another client was quicker
        self._order.retried_at.append(self._world.seconds)
        self._world.trace.tell("client", "lets it run again", job=self._order.name)
