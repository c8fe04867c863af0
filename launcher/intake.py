"""
From a request to a job in the queue.

Everything a client sends is looked at before anything is queued: the shape (`schemas.JobOrder`), the files (read to
their end and judged by their content), what the workflow would do with it. Over HTTP nothing names a file of this
computer: files are uploads, workflows are known by name or are graphs, results go where the queue puts them.

The same idempotency key with the same body is the same job, also if a picture comes along: its folder is named by the
key and the picture's own bytes, so that a repeated request means the same file.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from uuid import uuid4
from weakref import WeakKeyDictionary, WeakValueDictionary

from fastapi import Request
from fastapi.exceptions import RequestValidationError

import workflows
from launcher.api_words import in_api_words, with_key
from launcher.backend import Backend
from launcher.errors import HttpError, NotSupported
from launcher.multipart import Form, read_form
from launcher.orders import KEY_MOST, check_texts, key_of, merged, order_of, whole_body
from launcher.schemas import JobOrder
from launcher.strict_json import strict_json
from launcher.teller import teller_of
from launcher.upload_store import Incoming, Kept, UploadStore, made_id
from launcher.views import input_files
from runcomfy.adapters.workflow_registry import Resolved, WorkflowRegistry
from runcomfy.application.job_queue import INLINE, JobQueue
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import BadInput, IdempotencyConflict, RunComfyError, ValueInvalid, foreign_text
from runcomfy.domain.job import JobRequest
from runcomfy.domain.named_inputs import meaning_of, names_a_file
from runcomfy.domain.queued import NewJob, QueuedJob, QueueStatus
from runcomfy.domain.sidecar import Sidecar
from runcomfy.domain.workflow import Workflow

METADATA_MOST: Final = 16 * 1024
UPLOAD: Final = "upload:"
JSON: Final = "application/json"
MULTIPART: Final = "multipart/form-data"
_NEGATIVE: Final = ("negative", "negative_prompt")
_REFUSALS: Final = (BadInput, HttpError, RequestValidationError)
"""After one of these nothing was queued."""
_SEED: Final = re.compile(r"(?:.*[_.])?(?:noise_)?seed\Z")


def _schema(files: bool) -> dict[str, Any]:
    schema = JobOrder.model_json_schema()
    if files:
        schema["properties"] = {
            **schema["properties"],
            "job": {"type": "string", "description": "All other fields as one JSON text."},
            "image": {"type": "string", "format": "binary"},
        }
        schema["required"] = []
        schema["additionalProperties"] = {"type": "string", "format": "binary"}
        schema["description"] = "The fields of the JSON body one by one, or as `job`; files by the names of inputs."
    return schema


MAKE_JOB: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {JSON: {"schema": _schema(files=False)}, MULTIPART: {"schema": _schema(files=True)}},
    },
    "parameters": [
        {
            "name": "Idempotency-Key",
            "in": "header",
            "required": False,
            "description": "The same key with the same body is the same job, for as long as the job is kept.",
            "schema": {"type": "string", "minLength": 1, "maxLength": KEY_MOST, "pattern": "^[!-~]+$"},
        }
    ],
}
"""What FastAPI cannot tell by itself of a body that may come in two forms."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What own history says a job would take and cost; None: it says nothing, or there are no prices."""

    value: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class Taken:
    """What came of a request: a job, or an estimate if that was all it asked for."""

    job: QueuedJob | None = None
    replayed: bool = False
    estimate: Estimate | None = None


@dataclass(slots=True)
class _Given:
    """A request's body, read whole."""

    order: JobOrder
    form: Form = field(default_factory=Form)


class _State:
    """What lasts longer than a request."""

    def __init__(self, app: App) -> None:
        files = app.settings.files
        self.uploads = UploadStore(
            files.state_dir, most_bytes=app.settings.http.max_upload_bytes, max_pixels=files.max_input_pixels
        )
        settings = app.queue_settings
        self.registry = WorkflowRegistry(
            root=settings.root, workflows_file=settings.workflows_file, shipped=workflows.names
        )
        self.alone: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.judging: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.under_way: dict[str, set[str]] = {}
        """Client -> the keys of its requests that were let in and may put a job in."""


_STATES: WeakKeyDictionary[App, _State] = WeakKeyDictionary()


def _state_of(app: App) -> _State:
    found = _STATES.get(app)
    if found is None:
        found = _STATES[app] = _State(app)
    return found


def uploads_of(app: App) -> UploadStore:
    """Return where the app's uploads are kept."""
    return _state_of(app).uploads


def registry_of(app: App) -> WorkflowRegistry:
    """Return what knows workflows by name: the project's own, then those that ship."""
    return _state_of(app).registry


class Intake:
    """Takes the requests of one backend; made anew for each."""

    def __init__(self, backend: Backend) -> None:
        self._backend, self._app = backend, backend.app
        self._uploads, self._registry = uploads_of(backend.app), registry_of(backend.app)
        self._brought: list[Kept] = []

    # -- the whole way -------------------------------------------------------------------------------------

    async def take(self, request: Request) -> Taken:
        """Read a request to its end and put its job in.

        Raises BadInput, TooLarge, TooManyRequests, RequestValidationError: nothing was queued and nothing is kept;
        LocalError.
        """
        store = self._backend.queue.store
        client = self._client(request)
        said = key_of(request)
        key = f"{client}{said}" if said is not None else f"{client}/{uuid4()}"
        async with self._alone(key), AsyncExitStack() as stack:
            known = said is not None and key in await store.known_keys([key])
            if not known:
                await stack.enter_async_context(self._let_in(request, client, key))
            form = Form()
            try:
                given = await self._read(request)
                form = given.form
                new = await self._new_job(given, key, repeatable=said is not None)
                if given.order.dry_run:
                    await self._check(new.request)
                    taken = Taken(estimate=Estimate(await self._estimate(new, given.order)))
                    await self._uploads.forget(self._brought)
                    return taken
                await self._use(new.request, key)
                job = await self._queue().enqueue(new)
            except BaseException as error:
                await form.abort()
                # Where nothing is known of the queue's word (a database that did not answer), its files stay; also
                # where another process may have put the key's job in meanwhile, over the same files.
                if isinstance(error, _REFUSALS) and (known or not isinstance(error, IdempotencyConflict)):
                    await self._uploads.forget(self._brought)
                if said is not None and isinstance(error, IdempotencyConflict):
                    raise with_key(error, key, said) from error
                raise
            return Taken(job, replayed=known)

    async def _use(self, request: JobRequest, key: str) -> None:
        """Say that a job uses its files, before it is put in. Raises NotFound, LocalError."""
        await self._uploads.use([path for _, path in input_files(request)], key, queue=self._backend.queue_name)

    async def again(self, request: Request, job: QueuedJob, seed: int | None) -> QueuedJob:
        """Put the same job in once more, with another seed. Raises BadInput, TooManyRequests, LocalError."""
        if job.request is None:
            raise ValueInvalid("the job's row says nothing of what to run", hint="put a new job in")
        client = self._client(request)
        key = f"{client}/{uuid4()}"
        async with self._let_in(request, client, key):
            return await self._again(job, job.request, seed, key)

    async def _again(self, job: QueuedJob, before: JobRequest, seed: int | None, key: str) -> QueuedJob:
        fresh = replace(
            before,
            job_id=None,
            seed=seed,
            # Seeds that were given otherwise would stay the same.
            inputs={name: value for name, value in before.inputs.items() if not _SEED.match(name)},
            sets={name: value for name, value in before.sets.items() if not _SEED.match(name)},
            required_inputs=tuple(name for name in before.required_inputs if not _SEED.match(name)),
            out_file=None,
            earlier_outputs={},
        )
        await self._use(fresh, key)
        new = NewJob(
            fresh,
            job.workflow_id,
            job_type=job.job_type,
            priority=job.priority,
            retry_limit=job.retry_limit,
            metadata=job.metadata,
            user=job.user,
            project=job.project,
            idempotency_key=key,
        )
        return await self._backend.queue.enqueue(new)

    def _client(self, request: Request) -> str:
        """Return what the idempotency keys of a client begin with: no client sees another one's."""
        principal = self._backend.guard.principal_of(request)
        return f"http/{principal.kind}/{principal.name}/"

    @asynccontextmanager
    async def _alone(self, key: str) -> AsyncIterator[None]:
        """Let requests with the same key come one after another: all but the first are repetitions."""
        lock = _state_of(self._app).alone.setdefault(key, asyncio.Lock())
        async with lock:
            yield

    @asynccontextmanager
    async def _let_in(self, request: Request, client: str, key: str) -> AsyncIterator[None]:
        """Let a request of a client put a job in, and count it as one until it has. Raises TooManyRequests, LocalError.

        One of a client's requests is judged after the other, so that none is refused for one that is refused itself.
        """
        guard, state = self._backend.guard, _state_of(self._app)
        under_way = state.under_way.setdefault(client, set())
        async with state.judging.setdefault(client, asyncio.Lock()):
            guard.admit_jobs(guard.principal_of(request), 1, waiting=await self._waiting(client, frozenset(under_way)))
            under_way.add(key)
        try:
            yield
        finally:
            under_way.discard(key)

    async def _waiting(self, client: str, coming: frozenset[str]) -> int:
        """Return how many jobs of a client wait, with those that come in at this moment.

        Only when many wait at all is it looked whose they are.
        """
        queue = self._backend.queue
        pending = (await queue.counts()).get(QueueStatus.PENDING, 0)
        if pending + len(coming) < self._backend.guard.http.max_waiting:
            return 0
        keys = {job.idempotency_key or "" for job in await queue.list(status=QueueStatus.PENDING)}
        return len(coming | {key for key in keys if key.startswith(client)})

    # -- reading -------------------------------------------------------------------------------------------

    async def _read(self, request: Request) -> _Given:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        http = self._backend.guard.http
        if kind == JSON:
            most = http.max_upload_bytes * 4 // 3 + http.max_body_bytes
            return _Given(order_of(strict_json(await whole_body(request, most))))
        if kind != MULTIPART:
            raise NotSupported(
                "a job is sent as application/json or multipart/form-data", hint="say which with Content-Type"
            )

        async def open_sink(_: str, file_name: str) -> Incoming:
            return await self._uploads.open(file_name)

        form = await read_form(request, open_sink, field_most=http.max_body_bytes)
        try:
            return _Given(order_of(merged(form)), form)
        except BaseException:
            await form.abort()
            raise

    # -- building ------------------------------------------------------------------------------------------

    async def _new_job(self, given: _Given, key: str, *, repeatable: bool) -> NewJob:
        order = given.order
        as_id = key if repeatable else None
        self._check_order(order)
        resolved = await self._resolved(order)
        for name, sink in given.form.files:
            if not isinstance(sink, Incoming):  # there are no others
                raise TypeError(type(sink).__name__)
            kept = await sink.keep(as_id=as_id, salt=name)
            self._brought.append(kept)
            if name == "image":
                _once(order.image is None and order.image_url is None)
                order.image = f"{UPLOAD}{kept.id}"
            elif name in order.inputs or name in order.sets:
                raise ValueInvalid(f"{foreign_text(name, 80)} is given twice", hint="as a file or as a value")
            else:
                order.inputs[name] = f"{UPLOAD}{kept.id}"
        inputs = {name: await self._value(f"inputs.{name}", value, as_id) for name, value in order.inputs.items()}
        sets = {name: await self._value(f"sets.{name}", value, as_id) for name, value in order.sets.items()}
        if order.negative is not None:
            name = await self._negative(resolved, inputs)
            inputs[name] = _literal(order.negative)
        request = JobRequest(
            resolved.workflow if isinstance(order.workflow, str) else order.workflow,
            image=await self._image(order, as_id),
            prompt=order.prompt,
            seed=order.seed,
            sets=sets,
            inputs=inputs,
            timeout=timedelta(seconds=order.timeout_s) if order.timeout_s is not None else None,
            convert=order.convert,
            server_type=order.server_type or None,
            input_names=resolved.input_names,
            required_inputs=resolved.required_inputs,
        )
        return NewJob(
            request,
            order.workflow if isinstance(order.workflow, str) else INLINE,
            job_type=order.job_type or "JOB",
            priority=order.priority,
            retry_limit=order.retry_limit,
            metadata={**order.metadata, **({"webhook_url": order.webhook_url} if order.webhook_url else {})},
            user=order.user,
            project=order.project,
            idempotency_key=key,
        )

    def _check_order(self, order: JobOrder) -> None:
        """Refuse what no route, queue or database should have to carry. Raises BadInput."""
        from launcher.guarding.addresses import checked_url

        for name, value in (("workflow", order.workflow), ("inputs", order.inputs), ("sets", order.sets)):
            check_texts(value, name)
        check_texts(order.metadata, "metadata")
        if len(json.dumps(order.metadata)) > METADATA_MOST:
            raise ValueInvalid(f"the metadata has more than {METADATA_MOST} bytes", hint="keep large things elsewhere")
        if "webhook_url" in order.metadata:
            raise ValueInvalid("metadata cannot say where a webhook goes", hint="use the field webhook_url")
        for url in filter(None, (order.webhook_url, order.image_url)):
            checked_url(url, allow_private=self._app.settings.http.allow_private)
        types = self._app.pool_types()
        if order.server_type and order.server_type not in types:
            raise ValueInvalid(
                f"{foreign_text(order.server_type, 60)!r} is no machine type that jobs may ask for",
                hint=f"use one of {', '.join(types)}, or leave it out",
            )

    async def _resolved(self, order: JobOrder) -> Resolved:
        if not isinstance(order.workflow, str):
            return Resolved(INLINE)
        return await asyncio.to_thread(self._registry.resolve, order.workflow)

    async def _negative(self, resolved: Resolved, inputs: Mapping[str, Any]) -> str:
        """Return what the workflow calls its negative prompt; what is not there is refused when it is bound."""
        found = [name for name in _NEGATIVE if name in resolved.input_names]
        if not found and resolved.workflow != INLINE:
            toml = (await asyncio.to_thread(self._app.workflow_files(), resolved.workflow))[1]
            sidecar = Sidecar.parse(toml, resolved.workflow) if toml is not None else Sidecar()
            found = [name for name in _NEGATIVE if name in sidecar.inputs]
        name = found[0] if found else _NEGATIVE[0]
        if name in inputs:
            raise ValueInvalid(f"the negative prompt is given twice, as negative and as inputs.{name}")
        return name

    async def _value(self, name: str, value: Any, as_id: str | None) -> Any:
        """Return a value as the queue takes it: files as `@path` of an upload. Raises BadInput, NotFound."""
        if not isinstance(value, str):
            return value
        plain = value.removeprefix("@") if value.startswith("@") and not value.startswith("@@") else value
        if plain.startswith(UPLOAD):
            return f"@{await self._uploads.find(plain.removeprefix(UPLOAD))}"
        if plain.startswith("data:") and ";base64," in plain[:200]:
            return f"@{(await self._decoded(name, plain, as_id)).path}"
        if plain != value or value == "@":
            raise ValueInvalid(
                f"{foreign_text(name, 80)}: over HTTP a value that begins with @ names an upload",
                hint="send the file with POST /uploads and write upload:ID; write @@ for a text that begins with @",
            )
        return value

    async def _image(self, order: JobOrder, as_id: str | None) -> str | None:
        if order.image_url is not None:
            _once(order.image is None)
            return await self._fetched(order.image_url, as_id)
        if order.image is None:
            return None
        found = await self._value("image", order.image, as_id)
        if not isinstance(found, str) or not found.startswith("@") or found.startswith("@@"):
            raise ValueInvalid(
                "image is neither an upload nor a data URL",
                hint="send the file as multipart, or with POST /uploads and write upload:ID",
            )
        return found.removeprefix("@")

    async def _decoded(self, name: str, url: str, as_id: str | None) -> Kept:
        head, _, text = url.partition(",")
        try:
            data = await asyncio.to_thread(base64.b64decode, text.encode("ascii"), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueInvalid(
                f"{foreign_text(name, 80)}: the data URL is not base64", hint=foreign_text(head)
            ) from error
        kept = await self._uploads.keep(data, f"{name.rpartition('.')[2]}.bin", as_id=as_id, salt=name)
        self._brought.append(kept)
        return kept

    async def _fetched(self, url: str, as_id: str | None) -> str:
        from launcher.guarding.fetching import fetch_public

        http = self._app.settings.http
        if as_id is not None:
            noted = self._uploads.folder / made_id(as_id, "url", url)
            if (path := await asyncio.to_thread(_only_file, noted)) is not None:
                return path
        incoming = await self._uploads.open(Path(url.partition("?")[0]).name or "image")
        spot = incoming.folder / ".fetched"
        try:
            await fetch_public(url, spot, limit_bytes=http.max_upload_bytes, allow_private=http.allow_private)
            await incoming.take(spot)
        except BaseException:
            await incoming.abort()
            raise
        kept = await incoming.keep(named=made_id(as_id, "url", url) if as_id is not None else None)
        self._brought.append(kept)
        return kept.path

    # -- checking ------------------------------------------------------------------------------------------

    def _queue(self) -> JobQueue:
        queue = self._backend.queue
        return JobQueue(queue.store, queue.settings, check=self._check, processes=self._app.processes)

    async def _check(self, request: JobRequest) -> None:
        """Refuse a request, in the words that its client knows. Raises BadInput."""
        with in_api_words():
            await self._check_run(request)

    async def _check_run(self, request: JobRequest) -> None:
        """Refuse what could never be run, and what would read a file of this computer that is no upload.

        A plain text where a workflow takes a file would be read from here if a file of that name is here when the job
        runs, which nobody can know now. It is refused before anything is looked at: what is here is nobody's business.
        """
        workflow, sidecar = await self._graph(request)
        for name, value in request.inputs.items():
            plain = isinstance(value, str) and not value.startswith("@")
            if plain and _takes_file(name, workflow, sidecar, request):
                shown = foreign_text(value, 60)
                raise ValueInvalid(
                    f"inputs.{foreign_text(name, 80)} takes a file, and {shown!r} is none that was sent",
                    hint="send it with POST /uploads and write upload:ID; a file on ComfyUI's side is named in sets",
                )
        prepared = await self._app.orchestrator().prepare(request)
        given = {path for _, path in input_files(request)}
        if any(upload.path in given and not self._uploads.holds(upload.path) for upload in prepared.bound.uploads):
            raise ValueInvalid("over HTTP only uploads can be inputs", hint="send the file with POST /uploads")

    async def _graph(self, request: JobRequest) -> tuple[Workflow, Sidecar]:
        if not isinstance(request.workflow, str):
            return Workflow.parse(request.workflow), Sidecar()
        text, toml, name = await asyncio.to_thread(self._app.workflow_files(), request.workflow)
        return Workflow.parse(text, name=name), Sidecar.parse(toml, name=name) if toml is not None else Sidecar()

    async def _estimate(self, new: NewJob, order: JobOrder) -> Mapping[str, Any] | None:
        try:
            return await teller_of(self._app).glances.estimate(new.workflow_id, server_type=order.server_type, count=1)
        except RunComfyError:
            return None  # no price of the type, or no history that can be read: valid all the same


def _takes_file(name: str, workflow: Workflow, sidecar: Sidecar, request: JobRequest) -> bool:
    meaning = meaning_of(name, workflow, sidecar, request.input_names)
    kinds = {workflow.resolve(target): item.kind for item in sidecar.inputs.values() for target in item.targets}
    return any(
        names_a_file(place, workflow, meaning.named.kind if meaning.named else kinds.get(place, ""))
        for place in meaning.places
    )


# -- small things --------------------------------------------------------------------------------------------


def _literal(text: str) -> str:
    """Return a text so that an @ at its beginning means nothing."""
    return f"@{text}" if text.startswith("@") else text


def _once(right: bool) -> None:
    if not right:
        raise ValueInvalid("the image is given twice", hint="as a file, as image, or as image_url")


def _only_file(folder: Path) -> str | None:
    try:
        return next((str(entry) for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")), None)
    except OSError:
        return None
