"""
What CONJURE's endpoints work with: services over this process's engine, the state file, the mode that holds.

One desk per served app. Its folder is the working directory at the time the app was made: CONJURE starts its server
there, and everything it says of files is relative to it.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from launcher.backend import Backend
from launcher.conjure import places
from launcher.conjure.errors import AgentMissing, MeshMissing, RenderMissing, ServiceUnavailable
from launcher.conjure.modes import Mode, ModeMemory
from launcher.conjure.queued import QueueEngine
from launcher.conjure.services import GenerationService, get_generation_service
from launcher.conjure.state_file import StateFile
from launcher.guarding.guard import Principal
from runcomfy.adapters.files import open_regular
from runcomfy.conjure.progress_tracker import STAGED, FluxMeshProgressTracker, progress_tracker
from runcomfy.domain.exceptions import InputFileInvalid, LocalError, RunComfyError, ValueInvalid, foreign_text
from runcomfy.domain.progress import Progress, Step
from runcomfy.domain.queued import QueuedJob, QueueStatus

AVAILABLE_SECONDS: Final = 5.0
"""How long an answer whether a mode is available counts."""
REPEATED_SECONDS: Final = 30.0
ONCE_ONLY: Final = frozenset({"generate_flux_mesh", "import_and_process_mesh", "spawn_primitive"})
"""Instructions that CONJURE's agents repeat by mistake: the same one is obeyed once in `REPEATED_SECONDS`."""
RENDER_SECONDS: Final = 10.0
"""How long Blender may take for a picture; it writes one every 3 s anyway."""
_LOOK_SECONDS: Final = 0.1
_MOST_REMEMBERED: Final = 1_000
LARGEST_MESH: Final = 1 << 30


class Desk:
    """Where CONJURE's requests are dealt with."""

    def __init__(self, backend: Backend, root: Path | None = None) -> None:
        """On the event loop that serves."""
        self.backend = backend
        self.root = root or Path.cwd()
        self.engine = QueueEngine(backend)
        self.state = StateFile(self.root / places.STATE)
        self.places = places.Places(self.root)
        self._memory = ModeMemory()
        self._known: dict[str, tuple[float, bool, str]] = {}
        self._obeyed: dict[str, float] = {}
        self._agents = _Agents()
        self._tracker = FluxMeshProgressTracker(clock=backend.app.clock)
        self._leaving: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Take up what an earlier process left undone, and let go of everything when the service ends; once."""
        if self._leaving is None:
            self._leaving = asyncio.create_task(self._leave(), name="conjure-leaving")
            await self.engine.resume()

    async def _leave(self) -> None:
        await self.backend.closing.wait()
        await self.engine.close()

    async def admit(self) -> None:
        """Let one more generation in. Raises TooManyRequests.

        These endpoints ask for no token, so anything on this computer may spend money over them.
        """
        guard, counts = self.backend.guard, await self.backend.queue.counts()
        waiting = counts.get(QueueStatus.PENDING, 0)
        guard.admit_jobs(guard.principal("conjure"), 1, waiting=waiting)

    async def name_files(self, who: Principal, *paths: str) -> None:
        """Let a client name files. Raises ValueInvalid: it may not name these.

        These endpoints ask for no token, so anybody on this computer, other users too, could otherwise have files
        read that only this process may read, or find out which there are.
        """
        if who.kind != "conjure" or self.backend.guard.http.conjure_anywhere:
            return
        for path in paths:
            if not await asyncio.to_thread(self.places.holds, path):
                raise ValueInvalid(
                    "the file is outside of CONJURE's folder",
                    hint="put it into that folder, send the token, or set RUNCOMFY_HTTP_CONJURE_ANYWHERE=true",
                )

    # -- modes and services --------------------------------------------------------------------------------

    async def mode(self) -> Mode:
        """Return the mode that holds; by what was last read if the state file cannot be read now. Never raises."""
        try:
            return self._memory.of(await asyncio.to_thread(self.state.read))
        except LocalError as error:
            return Mode(self._memory.of(self.state.last).name, error.message)

    def service(self, mode: str) -> GenerationService:
        """Return the service of a mode. Raises ServiceUnavailable, ModeUnknown, ConfigurationError."""
        try:
            return get_generation_service(mode, self.engine, root=str(self.root))
        except ImportError as error:
            raise ServiceUnavailable(f"the mode {mode} is not installed: {foreign_text(error)}") from error

    async def available(self, mode: str) -> tuple[bool, str]:
        """Return whether a mode can be used, and why not. Never raises."""
        now = time.monotonic()
        known = self._known.get(mode)
        if known is None or now - known[0] > AVAILABLE_SECONDS:
            found = await asyncio.to_thread(self._availability, mode)
            known = self._known[mode] = (now, *found)
        return known[1], known[2]

    def _availability(self, mode: str) -> tuple[bool, str]:
        try:
            service = self.service(mode)
            look = getattr(service, "availability", None)
            if look is not None:
                able, why = look()
                return bool(able), str(why)
            able = service.is_available()
        except RunComfyError as error:
            return False, error.message
        return able, "" if able else "it is not set up"

    async def generate(self, mode: str, call: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Call a method of a mode's service without holding up the event loop.

        Raises ServiceUnavailable: the mode has no such call, or cannot be used.
        """
        service = await asyncio.to_thread(self.service, mode)
        twin: Any = getattr(service, f"a_{call}", None)
        plain: Any = getattr(service, call, None)
        if twin is None and plain is None:
            raise ServiceUnavailable(f"the mode {mode} cannot do that", hint="choose another generation mode")
        calling: Any = twin or partial(asyncio.to_thread, plain)
        found: dict[str, Any] = await calling(*args, **kwargs)
        return found

    # -- Blender -------------------------------------------------------------------------------------------

    async def import_mesh(self, mesh_path: str, min_volume_threshold: float) -> dict[str, Any]:
        """Tell the add-on to import a mesh. Raises FileNotFoundError, InputFileInvalid, LocalError."""
        await asyncio.to_thread(check_mesh, self.places.at(mesh_path))
        told = {"mesh_path": mesh_path, "min_volume_threshold": min_volume_threshold}
        await asyncio.to_thread(self.state.update, {"command": "import_and_process_mesh", **told})
        return told

    async def render(self) -> str:
        """Have the add-on render what the camera sees, and return the picture's path when it is a new one.

        Raises RunComfyError: no new picture came in time.
        """
        before = await asyncio.to_thread(self._render_mark)
        await asyncio.to_thread(self.state.update, {"command": "render_gesture_camera"})
        loop = asyncio.get_running_loop()
        until = loop.time() + RENDER_SECONDS
        while loop.time() < until:
            now = await asyncio.to_thread(self._render_mark)
            if now is not None and now != before:
                return str(places.RENDER)
            await asyncio.sleep(_LOOK_SECONDS)
        raise RenderMissing(
            f"Blender has rendered no new picture within {RENDER_SECONDS:.0f} s",
            hint=f"see whether Blender runs with CONJURE's add-on; it writes {places.RENDER}",
        )

    def _render_mark(self) -> tuple[int, int] | None:
        """Return what tells one whole picture from another; None: there is none, or it is being written."""
        try:
            with open_regular(self.root / places.RENDER, follow=True) as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - 12))
                tail = file.read()
            found = (self.root / places.RENDER).stat()
        except OSError:
            return None
        return (found.st_mtime_ns, found.st_size) if b"IEND" in tail else None

    # -- agents --------------------------------------------------------------------------------------------

    def repeated(self, instruction: Mapping[str, Any], digest: str) -> bool:
        """Whether the same instruction came a moment ago; if not, it is remembered."""
        now = time.monotonic()
        self._obeyed = {key: at for key, at in self._obeyed.items() if now - at < REPEATED_SECONDS}
        if instruction.get("tool_name") not in ONCE_ONLY:
            return False
        if digest in self._obeyed:
            return True
        if len(self._obeyed) < _MOST_REMEMBERED:
            self._obeyed[digest] = now
        return False

    def forget(self, digest: str) -> None:
        """Forget an instruction that was not obeyed after all."""
        self._obeyed.pop(digest, None)

    @staticmethod
    def agents_only_listen() -> bool:
        """Whether this is the newer revision of CONJURE, whose launcher goes through the steps by itself."""
        return _found("session_cleaner") is not None and _found("instruction_manager") is not None

    async def execute(self, instruction: dict[str, Any]) -> None:
        """Have CONJURE's own InstructionManager obey. Raises ServiceUnavailable: it is not there."""
        await asyncio.to_thread(self._agents.execute, instruction)

    async def converse(self, history: str, include_image: bool) -> Any:
        """Have CONJURE's own BackendAgent answer. Raises ServiceUnavailable: it is not there."""
        return await asyncio.to_thread(self._agents.converse, history, include_image)

    # -- progress ------------------------------------------------------------------------------------------

    async def progress(self, prompt_id: str) -> dict[str, Any] | None:
        """Return the summary of a workflow by the id of its prompt or its job; None: there is none."""
        job = await self._job(prompt_id)
        if job is None:
            return progress_tracker.get_workflow_summary(prompt_id)
        return self._summary(job)

    async def all_progress(self) -> list[dict[str, Any]]:
        """Return the summaries of everything that runs or waits, or was run without the queue."""
        active: list[QueuedJob] = []
        for status in (QueueStatus.PROCESSING, QueueStatus.PENDING):
            active += await self.backend.queue.list(status=status, limit=100)
        summaries = {job.uid: self._summary(job) for job in active}
        direct = (each for each in progress_tracker.summaries() if each["status"] in ("pending", "running"))
        return [*summaries.values(), *direct]

    async def _job(self, key: str) -> QueuedJob | None:
        store = self.backend.queue.store
        if (job := await store.job(key)) is not None and job.uid == key:
            return job
        for status in (QueueStatus.PROCESSING, QueueStatus.DONE, QueueStatus.FAILED):
            for each in await store.jobs(status=status, limit=200, newest_first=True):
                if key in (each.prompt_id, each.result.get("prompt_id")):
                    return each
        return None

    def _summary(self, job: QueuedJob) -> dict[str, Any]:
        live = self.backend.app.live.job(job.uid)
        seen = live.progress if live is not None else Progress(Step.QUEUED, job.progress, job.message)
        name = job.workflow_id
        if self._tracker.get_workflow_summary(job.uid) is None:
            self._tracker.start_workflow_tracking(name, job.uid, "", staged=name in STAGED)
        self._tracker.observe(job.uid, seen, workflow_name=name)
        if job.ended:
            done = job.status is QueueStatus.DONE
            words = "" if done else foreign_text(job.message or job.reason)
            self._tracker.handle_workflow_completion(job.uid, success=done, error_message=words)
        summary = self._tracker.get_workflow_summary(job.uid) or {}
        if job.status is QueueStatus.PENDING:
            summary["status"] = "pending"
        prompt_id = job.prompt_id or job.result.get("prompt_id") or job.uid
        return {**summary, "prompt_id": str(prompt_id), "job_id": job.uid}

    async def close(self) -> None:
        """Stop waiting for jobs."""
        leaving, self._leaving = self._leaving, None
        if leaving is not None:
            leaving.cancel()
            await asyncio.wait({leaving})
        await self.engine.close()


def check_mesh(path: Path) -> None:
    """Make sure that a file is a binary glTF. Raises FileNotFoundError, InputFileInvalid."""
    try:
        with open_regular(path, follow=True) as file:
            head, size = file.read(12), os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise MeshMissing(f"Mesh file not found: {foreign_text(path.name, 200)}", hint="check the path") from error
    except OSError as error:
        raise InputFileInvalid(f"the mesh cannot be read: {foreign_text(error.strerror or error)}") from error
    if head[:4] != b"glTF" or len(head) < 12:
        raise InputFileInvalid("the file is no binary glTF (.glb)", hint="import meshes as .glb files")
    if size > LARGEST_MESH:
        raise InputFileInvalid(f"the mesh is larger than {LARGEST_MESH >> 20} MiB", hint="simplify it")


def digest_of(instruction: Mapping[str, Any]) -> str:
    """Return what identifies an instruction by its content."""
    return sha256(json.dumps(instruction, sort_keys=True, default=str).encode()).hexdigest()


class _Agents:
    """CONJURE's own agents, if they can be imported: this process runs as CONJURE's API server then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._manager: Any = None
        self._agent: Any = None

    def execute(self, instruction: dict[str, Any]) -> None:
        with self._lock:
            manager = self._instructions()
        manager.execute_instruction(instruction)

    def converse(self, history: str, include_image: bool) -> Any:
        with self._lock:
            if self._agent is None:
                self._agent = _class("backend_agent", "BackendAgent")(instruction_manager=self._instructions())
            agent = self._agent
        try:
            return agent.get_response(conversation_history=history, include_image=include_image)
        except TypeError as error:
            if "include_image" not in str(error):
                raise
            return agent.get_response(history)  # the older revision's has one parameter

    def _instructions(self) -> Any:
        if self._manager is None:
            state = _class("state_manager", "StateManager")()
            self._manager = _class("instruction_manager", "InstructionManager")(state)
        return self._manager


def _found(module: str) -> str | None:
    """Return the name under which a module of CONJURE's launcher can be imported."""
    for candidate in (module, f"launcher.{module}"):
        if candidate in sys.modules or importlib.util.find_spec(candidate) is not None:
            return candidate
    return None


def _class(module: str, name: str) -> Any:
    """Return a class of CONJURE's own launcher folder."""
    found = _found(module)
    if found is not None:
        try:
            return getattr(importlib.import_module(found), name)
        except (ImportError, AttributeError) as error:
            raise AgentMissing(
                f"CONJURE's {module} cannot be used: {foreign_text(error)}",
                hint="install what CONJURE needs into this environment",
            ) from error
    raise AgentMissing(
        f"CONJURE's {module} is not here",
        hint="this works when the server is started from CONJURE's own launcher folder (comfyctl conjure install)",
    )
