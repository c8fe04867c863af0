"""
What ComfyUI servers, files and clients say of a simulated day: I10-I18, I20, I24, I25.

What ran is asked of the servers' run logs, what came of it of the files on the disk, what was promised of the clients.
The queue's rows are what is judged.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from PIL import Image

from runcomfy.adapters.job_folder import DISCARDED, REJECTED
from runcomfy.domain.machine import OwnerId
from runcomfy.domain.queued import LAST_WORDS, EventKind, QueuedJob, QueueStatus, Reason
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.comfyui.nodes.probes import picture_of
from runcomfy.testing.emulators.comfyui.process import RunRecord, SubmitRecord
from runcomfy.testing.simulation.harm import harm_of
from runcomfy.testing.simulation.load import Order, number_of
from runcomfy.testing.simulation.violations import Found

if TYPE_CHECKING:
    from runcomfy.testing.simulation.world import World

LATE_MOST: Final = 600.0
"""Undisturbed seconds after a prompt's end in which its result must be there, sockets or none."""
DEATHS: Final = frozenset({1, 2, 3, 61})
"""Faults of the catalogue with which a program is killed."""
MORE_RUNS: Final = 5
"""Runs that cost a job nothing, beside those that its limit allows: kill_limit 2 and lost_limit 3."""


class JobsOracle:
    """Knows what one world's clients, servers and files say."""

    def __init__(self, world: World, found: Found) -> None:
        self.world, self.found = world, found
        self.harm = harm_of(world)
        self._start = world.clock.now().timestamp() - world.seconds
        self._orphaned: dict[str, float] = {}
        """Undisturbed seconds for which a job was held by a process that is dead."""

    # -- each minute ---------------------------------------------------------------------------------------

    async def look(self, passed: float) -> None:
        """I20: no job stays with a dead process."""
        services = self.world.services
        held = await services.queue.list(status=QueueStatus.PROCESSING)
        queue = services.queue_settings
        patience = (queue.lease + 2 * queue.reap_every).total_seconds() + 120
        orphans = {job.config_name for job in held if self._is_dead(job)}
        for name in set(self._orphaned) - orphans:
            del self._orphaned[name]
        for name in orphans:
            alone = self._orphaned[name] = self._orphaned.get(name, 0.0) + passed
            if alone > patience:
                what = f"it is held by a process that died, and nobody took it back for {alone:.0f} s"
                self.found.add("I20", what, name, at=self.world.seconds, mark="held")

    # -- at the end ----------------------------------------------------------------------------------------

    async def judge(self) -> None:
        """Compare rows, files, run logs and promises."""
        rows = {job.config_name: job for job in await self.world.services.queue.list()}
        runs = self._runs()
        submits = self._submits()
        for name, order in self.world.acknowledged.items():
            job = rows.get(name)
            if job is None:
                self._say("I10", "it was accepted, and there is no such job", name)
                continue
            await self._judge_row(order, job)
            self._judge_runs(order, job, runs.get(order.number, []))
            self._judge_submits(order, submits.get(order.number, []))
            self._judge_files(order, job, _seeds(runs.get(order.number, [])))
            for invariant, what in order.complaints:
                self._say(invariant, what, name)
        self._judge_repeats(runs)
        self._judge_by_hand()
        self._judge_strays(rows)
        self._judge_secrets()

    def _is_dead(self, job: QueuedJob) -> bool:
        """Return whether a job is held by a process that is dead: workers are called as owners are."""
        return job.worker_id is not None and OwnerId(job.worker_id) in self.world.services.processes.dead

    def _say(self, invariant: str, what: str, subject: str = "") -> None:
        self.found.add(invariant, what, subject, at=self.world.seconds)

    async def _judge_row(self, order: Order, job: QueuedJob) -> None:
        """I10, I25: it has ended, in one way, and its log says the same."""
        story = await self.world.services.queue.show(job)
        words = [event.kind for event in story.events if event.kind in LAST_WORDS]
        lives = 1 + sum(event.kind is EventKind.RETRIED for event in story.events)
        if not job.ended:
            invariant = "I20" if self._is_dead(job) else "I25"
            self._say(invariant, f"it was accepted at {order.accepted_at:.0f} s and is {job.status}", order.name)
            return
        if len(words) > lives or not words:
            self._say("I10", f"it lived {lives} times and has the last words {list(map(str, words))}", order.name)
        if (job.status is QueueStatus.DONE) != (bool(words) and words[-1] is EventKind.DONE):
            self._say("I10", f"it is {job.status}, and its last word is {words[-1:]}", order.name)
        if job.status is QueueStatus.FAILED and not job.reason:
            self._say("I10", "it failed without a reason", order.name)
        if words.count(EventKind.DONE) > lives:
            self._say("I11", f"its results were committed {words.count(EventKind.DONE)} times", order.name)
        if job.status is QueueStatus.DONE and not order.kind.works:
            self._say("I15", "it is done, and can never have worked", order.name)

    def _judge_runs(self, order: Order, job: QueuedJob, runs: list[tuple[str, RunRecord]]) -> None:
        """I12, I14: never two at a time, never too many."""
        spans = [(self._of(record.started), self._of(record.ended), server, record) for server, record in runs]
        spans.sort(key=lambda span: span[:3])
        for (_, end, server, record), (start, _, other, later) in pairwise(spans):
            if start < end - 0.001 and record.prompt_id != later.prompt_id:
                what = f"prompts {record.prompt_id} on {server} and {later.prompt_id} on {other} ran at the same time"
                self._say("I12", f"{what}, from {start:.0f} s to {end:.0f} s", order.name)
        begun = len({record.prompt_id for _, record in runs})
        most = (order.retry_limit + 1 + MORE_RUNS) * (1 + len(order.retried_at))
        if begun > most:
            self._say("I14", f"it was run {begun} times, at most {most} are allowed", order.name)
        if not order.kind.runs and begun:
            self._say("I14", "no server may run it, and one did", order.name)
        if job.reason == Reason.CANCELLED and order.cancelled_at is None:
            self._say("I17", "it is cancelled, and nobody asked for that", order.name)

    def _judge_submits(self, order: Order, submits: list[tuple[str, SubmitRecord]]) -> None:
        """I17: nothing is begun once its client was told that it is cancelled."""
        if order.cancelled_at is None:
            return
        for server, record in submits:
            at = self._of(record.at)
            late = at - order.cancelled_at
            if late > 1.0 and not self._woke(order.cancelled_at - 1.0, at):
                self._say("I17", f"it was sent to {server} {late:.0f} s after it was cancelled", order.name)

    def _judge_repeats(self, runs: dict[int, list[tuple[str, RunRecord]]]) -> None:
        """I13: a prompt is begun once, unless its server doubled it or a program sent it that had slept meanwhile.

        One that vanished from queue and history (37) does not count: it may be sent again if nobody had heard of it.
        Nor does one of which nothing is left since its server died (38), if whoever had sent it died before it could
        say so: at once while it ran, or without an answer.
        """
        submits = self._submits()
        for number, known in runs.items():
            answered = {(server, each.prompt_id, each.boot) for server, each in submits[number] if each.answered}
            begun: dict[str, list[tuple[float, str, int]]] = defaultdict(list)
            for server, record in known:
                begun[record.prompt_id].append((self._of(record.started), server, record.boot))
            times = Counter(
                record.prompt_id
                for server, record in known
                if not (server in self.harm.doubled or record.forgotten)
                and not self._unsaid(
                    record,
                    answered=(server, record.prompt_id, record.boot) in answered,
                    last=max(begun[record.prompt_id]),
                    server=server,
                )
            )
            for prompt_id, count in times.items():
                if count > 1 and not self._woke(min(begun[prompt_id])[0], max(begun[prompt_id])[0]):
                    self._say("I13", f"its prompt {prompt_id} was begun {count} times", f"job-{number}")

    def _unsaid(self, record: RunRecord, *, answered: bool, last: tuple[float, str, int], server: str) -> bool:
        """Whether nothing is left of a run, and a program died when it began, or before any answer to it.

        `last`: when and where its prompt was begun the last time.
        """
        at, (again, where, boot) = self._of(record.started), last
        if answered:
            return record.outcome == "lost" and self.harm.any_of(DEATHS, at - 1.0, at + 1.0)
        restarted = where == server and boot > record.boot
        return (record.outcome == "lost" or restarted) and self.harm.any_of(DEATHS, at - 1.0, max(at + 1.0, again))

    def _woke(self, start: float, end: float) -> bool:
        """Whether something that had slept since before may have gone on where it stood."""
        return any(blow.number in (62, 64) for blow in self.harm.between(start, end))

    def _judge_files(self, order: Order, job: QueuedJob, seeds: set[int]) -> None:
        """I15, I17: what is done is there, whole and its own; what is cancelled is not."""
        cancelled_last = order.cancelled_at is not None and not any(at > order.cancelled_at for at in order.retried_at)
        if job.status is QueueStatus.DONE and cancelled_last:
            self._say("I17", "it was cancelled, and is done", order.name)
        if job.status is not QueueStatus.DONE:
            if order.target.exists() and not order.retried_at and job.reason == Reason.CANCELLED:
                self._say("I17", f"it was cancelled, and {order.target.name} is there", order.name)
            return
        outputs = job.result.get("outputs", ())
        if not outputs:
            self._say("I15", "it is done, and has no result", order.name)
        for output in outputs:
            trouble = _of_file(Path(output["path"]), output, order, seeds)
            if trouble:
                self._say("I15", trouble, order.name)

    def _judge_strays(self, rows: dict[str, QueuedJob]) -> None:
        """I11: no file among the results that is not the one effect of a job."""
        folder = Path(self.world.services.queue_settings.jobs_finished)
        known = {
            str(Path(output["path"]).resolve()) for job in rows.values() for output in job.result.get("outputs", ())
        }
        for path in sorted(folder.glob("*")):
            kept_aside = path.name.startswith(".") or REJECTED in path.name or DISCARDED in path.name
            if path.is_file() and not kept_aside and str(path.resolve()) not in known:
                self._say("I11", f"{path.name} is no job's recorded result", path.name.partition(".")[0])

    def _judge_by_hand(self) -> None:
        """I8: a person's prompt is left alone."""
        for server, record in self._all_runs():
            if record.prompt_id in self.harm.by_hand and record.outcome == "interrupted":
                self._say("I8", f"a person's prompt was interrupted on {server}", server)

    def _judge_secrets(self) -> None:
        """I24: the token is in no file, and nobody has said it; files are ours alone."""
        token = self.world.cloud.token
        for line in self.world.trace.lines:
            if token in line.sentence:
                self._say("I24", f"{line.who} said the token at {line.at:.0f} s")
        machines = self.world.folder / "machines"
        for path in sorted(self.world.folder.rglob("*")):
            if machines in path.parents or not path.is_file():
                continue
            if token.encode() in path.read_bytes():
                self._say("I24", f"the token is in {path.name}")
        state = Path(self.world.services.settings.files.state_dir)
        for path in sorted(state.rglob("*")):
            if path.is_file() and path.stat().st_mode & 0o077 and path.suffix == ".json":
                self._say("I24", f"others may read {path.name}")

    # -- the servers' own logs -----------------------------------------------------------------------------

    def _of(self, stamp: float | None) -> float:
        return float("inf") if stamp is None else stamp - self._start

    def _servers(self) -> list[tuple[str, ComfyUIEmulator]]:
        machines = self.world.cloud.machines.values()
        found = [(m.server_id, m.comfyui or m.comfyui_was) for m in machines]
        return [(server_id, server) for server_id, server in found if isinstance(server, ComfyUIEmulator)]

    def _all_runs(self) -> list[tuple[str, RunRecord]]:
        return [(server_id, record) for server_id, server in self._servers() for record in server.run_log]

    def _runs(self) -> dict[int, list[tuple[str, RunRecord]]]:
        """Return what ran for each job."""
        found: dict[int, list[tuple[str, RunRecord]]] = defaultdict(list)
        for server_id, record in self._all_runs():
            number = number_of(record.graph)
            if number is not None:
                found[number].append((server_id, record))
        return found

    def _submits(self) -> dict[int, list[tuple[str, SubmitRecord]]]:
        found: dict[int, list[tuple[str, SubmitRecord]]] = defaultdict(list)
        for server_id, server in self._servers():
            for record in server.submit_log:
                number = number_of(record.graph)
                if number is not None:
                    found[number].append((server_id, record))
        return found

    def judge_lateness(self, rows: dict[str, QueuedJob]) -> None:
        """I18: what has succeeded on a server that lives is fetched within some looks, whatever sockets do."""
        for number, runs in self._runs().items():
            order = self.world.acknowledged.get(f"job-{number}")
            job = rows.get(f"job-{number}")
            if not isinstance(order, Order) or job is None or order.cancelled_at is not None:
                continue
            server, record = max(runs, key=lambda each: each[1].started)
            if record.outcome != "success" or self._is_dead(job):
                continue
            ended = self._of(record.ended)
            taken = self._of(job.end_time.timestamp()) if job.end_time is not None else float("inf")
            until = min(taken, ended + LATE_MOST + 1)
            blows = [b for b in self.harm.between(ended - 60, until, machine=server) if b.number not in SOCKETS]
            if until - ended > LATE_MOST and not blows:
                what = f"its prompt had succeeded at {ended:.0f} s, and {LATE_MOST:.0f} s later nobody knew"
                self._say("I18", what, order.name)


SOCKETS: Final = frozenset({44, 45, 46, 47, 48})


def _seeds(runs: list[tuple[str, RunRecord]]) -> set[int]:
    """Return the seeds that pictures of these runs were drawn with."""
    return {node["inputs"]["seed"] for _, record in runs for node in record.graph.values() if "seed" in node["inputs"]}


def _of_file(path: Path, output: dict[str, Any], order: Order, seeds: set[int]) -> str:
    """Return what is wrong with a result, if anything is."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    if len(data) != output["size_bytes"] or hashlib.sha256(data).hexdigest() != output["sha256"]:
        return f"{path.name} is not the file that was recorded"
    if path.suffix == ".png":
        try:
            with Image.open(io.BytesIO(data)) as picture:
                colour = picture.convert("RGB").getpixel((1, 1))
        except (OSError, SyntaxError) as error:
            return f"{path.name} is no picture: {error}"
        wanted = [picture_of(seed).frames[0].getpixel((1, 1)) for seed in seeds]
        if colour not in wanted:
            return f"{path.name} is another job's picture"
    elif path.suffix == ".txt" and f"job-{order.number} " not in data.decode(errors="replace"):
        return f"{path.name} is another job's text"
    elif path.suffix == ".glb" and data[:4] != b"glTF":
        return f"{path.name} is no mesh"
    return ""
