"""
The clients of a soak: they put jobs in over HTTP, and by command, and repeat what was not answered under the same key.

What was asked for once is a job, whatever was answered: a client does not give up. Some look what came of it, and one
listens to everything that is told.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp
from PIL import Image

from runcomfy.testing.emulators.comfyui.nodes.probes import picture_of
from runcomfy.testing.queue_programs import drawing

TIMEOUT: Final = aiohttp.ClientTimeout(total=8)
FOLLOWED: Final = 0.12
"""The share of jobs whose client asks what became of them, and fetches the result."""
Colour = tuple[int, ...]


@dataclass(eq=False)
class Put:
    """A job that a client wants."""

    key: str
    number: int
    colour: Colour
    """Of the result's picture."""
    body: dict[str, Any]
    asked_at: float
    asked: int = 0
    """How often it was sent."""
    job_id: str = ""
    cancelled: bool = False


@dataclass
class Books:
    """What the clients know at the end."""

    puts: dict[str, Put] = field(default_factory=dict)
    by_file: dict[str, Put] = field(default_factory=dict)
    """Jobs that were put in as files, by the file's name."""
    wrong: list[str] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    told: list[int] = field(default_factory=list)
    """Numbers of events, as a listener got them."""

    @property
    def unanswered(self) -> int:
        """How many puts nobody has answered yet."""
        return sum(not put.job_id for put in self.puts.values())


def colour_of(seed: int) -> Colour:
    """Return the colour of the picture that the emulated ComfyUI makes of a seed."""
    pixel = picture_of(seed).frames[0].getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return pixel


def new_put(draw: random.Random, number: int) -> Put:
    """Make up a job: most compute for a while, some take a picture with them."""
    key, body = f"soak-{number}", dict[str, Any]()
    if draw.random() < 0.25:
        colour = tuple(draw.randbytes(3))
        data = io.BytesIO()
        Image.new("RGB", (draw.randint(16, 200),) * 2, colour).save(data, format="PNG")
        picture = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        body = {"workflow": "image_invert", "image": picture}
        return Put(key, number, tuple(255 - value for value in colour), body, time.monotonic())
    seconds = draw.uniform(0.1, 0.6) if draw.random() < 0.85 else draw.uniform(0.6, 2)
    body = {"workflow": drawing(seconds, number), "seed": number}
    return Put(key, number, colour_of(number), body, time.monotonic())


class Clients:
    """They know the fronts' addresses (behind proxies) and the token."""

    def __init__(self, fronts: Sequence[tuple[str, str]], token: str, seed: int, books: Books) -> None:
        """`fronts`: each with its address on the way, and the name that it knows itself by."""
        self._fronts, self._token = list(fronts), token
        self._draw = random.Random(f"clients-{seed}")
        self.books = books
        self.stop = asyncio.Event()
        self.giving_up = asyncio.Event()
        """Set when even what was not answered is given up: the campaign has failed then."""

    def _session(self) -> aiohttp.ClientSession:
        headers = {"Authorization": f"Bearer {self._token}"}
        return aiohttp.ClientSession(
            headers=headers, timeout=TIMEOUT, connector=aiohttp.TCPConnector(force_close=False)
        )

    async def put_in(self, every: Callable[[], float]) -> None:
        """Put jobs in, one after the other, each once so many seconds have gone by, until told to stop."""
        async with self._session() as session:
            while not self.stop.is_set():
                put = new_put(self._draw, len(self.books.puts) + 1)
                self.books.puts[put.key] = put
                await self._send(session, put)
                if self._draw.random() < FOLLOWED:
                    await self._follow(session, put)
                try:
                    async with asyncio.timeout(every()):
                        await self.stop.wait()
                except TimeoutError:
                    continue

    async def _send(self, session: aiohttp.ClientSession, put: Put) -> None:
        while not put.job_id and not self.giving_up.is_set():
            put.asked += 1
            self.books.counted["puts"] += 1
            try:
                answer = await self._ask(session, "POST", "/jobs", json=put.body, headers={"Idempotency-Key": put.key})
            except _Unanswered as error:
                self.books.counted[f"put: {error}"] += 1
                await asyncio.sleep(self._draw.uniform(0.1, 0.8))
                continue
            put.job_id = str(answer["id"])

    async def _ask(self, session: aiohttp.ClientSession, method: str, path: str, **more: Any) -> Any:
        """Ask one of the fronts. Raises _Unanswered for what may be asked again."""
        front, host = self._draw.choice(self._fronts)
        headers = {**more.pop("headers", {}), "Host": host}
        try:
            async with session.request(method, front + path, headers=headers, **more) as answer:
                data = await answer.read()
                if answer.status in (200, 201):
                    return json.loads(data)
                if answer.status >= 500 or answer.status in (408, 429):
                    raise _Unanswered(str(answer.status))
                said = data[:500].decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise _Unanswered(type(error).__name__) from error
        if answer.status == 400 and "client left" in said:
            raise _Unanswered("400, cut")
        told = f"{method} {path} was answered with {answer.status}: {said}"
        if told not in self.books.wrong:
            self.books.wrong.append(told)
        await asyncio.sleep(1)
        raise _Unanswered(str(answer.status))

    async def _follow(self, session: aiohttp.ClientSession, put: Put) -> None:
        """Ask until it has ended, then fetch what came of it."""
        while not self.giving_up.is_set():
            await asyncio.sleep(0.5)
            try:
                job = await self._ask(session, "GET", f"/jobs/{put.job_id}")
                if job["status"] not in ("done", "failed"):
                    continue
                for output in job.get("outputs", ()):
                    data = await self._fetch(session, output["url"])
                    if hashlib.sha256(data).hexdigest() != output["sha256"]:
                        self.books.wrong.append(f"{put.key}: what {output['url']} sent is not what was recorded")
                    self.books.counted["results fetched"] += 1
            except _Unanswered as error:
                self.books.counted[f"look: {error}"] += 1
                continue
            return

    async def _fetch(self, session: aiohttp.ClientSession, path: str) -> bytes:
        front, host = self._draw.choice(self._fronts)
        try:
            async with session.get(front + path, headers={"Host": host}) as answer:
                if answer.status != 200:
                    raise _Unanswered(str(answer.status))
                return await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _Unanswered(type(error).__name__) from error

    async def listen(self) -> None:
        """Listen to everything, come back with the last number wherever the connection was lost."""
        number = re.compile(rb"^id: (\d+)\s*$")
        patience = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=20)
        async with self._session() as session:
            while True:
                front, host = self._draw.choice(self._fronts)
                headers = {"Host": host, "Last-Event-ID": str(self.books.told[-1] if self.books.told else 0)}
                try:
                    async with session.get(front + "/events", headers=headers, timeout=patience) as answer:
                        if answer.status != 200:
                            raise _Unanswered(str(answer.status))
                        self.books.counted["streams"] += 1
                        last: int | None = None
                        async for line in answer.content:
                            if (match := number.match(line)) is not None:
                                last = int(match[1])
                            elif line in (b"\n", b"\r\n") and last is not None:
                                self.books.told.append(last)  # the message is whole
                                last = None
                except (aiohttp.ClientError, TimeoutError, OSError, ValueError, _Unanswered):
                    await asyncio.sleep(self._draw.uniform(0.1, 0.5))


class _Unanswered(Exception):
    """What was asked may be asked again."""


def job_file(folder: Path, number: int, draw: random.Random, books: Books) -> Path:
    """Write a job file for `comfyctl queue add`, and note what is to come of it."""
    path = folder / "in" / f"T2I_20260101000000_{number}_soak.yaml"
    seed = 10_000_000 + number
    path.write_text(
        f"job_type: T2I\nworkflow_id: soak\ninputs: {{seed: {seed}, pause: {draw.uniform(0.1, 0.8):.2f}}}\n"
        f"outputs:\n  file_path: {folder / 'out' / path.stem}.png\n"
    )
    books.by_file[path.name] = Put(path.name, seed, colour_of(seed), {}, time.monotonic(), job_id="file")
    return path


def write_workflow(folder: Path) -> Path:
    """Write the workflow of the job files, and the list that names it; return the list."""
    (folder / "soak.json").write_text(json.dumps(drawing(0.5, 1)))
    path = folder / "workflows.yaml"
    path.write_text('soak:\n  template_path: "soak.json"\n  inputs: {seed: 1.seed, pause: 1.seconds_per_step}\n')
    return path
