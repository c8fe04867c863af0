"""
RunComfy's serverless API over HTTP on loopback, with one deployment, and an emulated ComfyUI on each of its instances.

It behaves as RunComfy's pages and the clients of the real service say: instances wake when requests wait, are billed
from then on and are kept warm for a while; the status says `completed` also for failures; results lie at another
address, which needs no token. It misbehaves where it is told to: `next_call` for single calls, `next_request` for
requests. Its own books say what ran and what was billed. No GPU is involved.
"""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote
from uuid import uuid4

import aiohttp
from aiohttp import web

import workflows
from runcomfy.testing.emulators.runcomfy.cloud import EmulatedCloud, Listener
from runcomfy.testing.emulators.runcomfy.faults import SPLASH, Outcome, send
from runcomfy.testing.emulators.runcomfy.machines import Span, in_seconds
from runcomfy.testing.emulators.serverless.requests import (
    NAMES,
    EmulatedInstance,
    EmulatedRequest,
    RequestTraits,
    result_of,
    status_of,
)
from runcomfy.testing.emulators.serverless.running import Canceled, Failed, Files, Runner

DEFAULT_TOKEN: Final = "emulated-token-1"  # noqa: S105 - it opens nothing but an emulator
DEFAULT_DEPLOYMENT: Final = "5d2c8f6e-91aa-4f0b-8d55-3e1b0c7a9001"
MAX_BODY: Final = 10 * 1024**2
"""The gateway's limit (AWS API Gateway, quotas)."""


class ServerlessEmulator(EmulatedCloud):
    """An emulated deployment. `async with ServerlessEmulator() as cloud:`; `environment()` points a client at it.

    Calls, as `next_call` knows them: `POST inference`, `GET requests/*/status`, `GET requests/*/result`,
    `POST requests/*/cancel`, `GET deployment`.
    """

    gate: int | None
    """A code that every submit is refused with: 10001 no money, 10002 disabled, 10003 deleted, 10013 empty."""
    gate_status: int
    """The HTTP status of that refusal; RunComfy sends some with 200."""
    british: bool
    """Whether it says `cancelled`, as some of RunComfy's pages do, and answers a cancel with an `outcome`."""
    tells_urls: bool
    """Whether a submit's answer names the addresses of the other calls."""
    deployment_told: bool
    """Whether the call about the deployment is answered."""
    requests: dict[str, EmulatedRequest]
    """Every request there ever was: what ran."""
    instances: list[EmulatedInstance]
    """Every instance there ever was: what was billed."""
    files: dict[str, bytes]
    """Results by path."""
    file_calls: list[tuple[str, dict[str, str]]]
    """Path and headers of every request for a result."""
    file_faults: list[str]
    """How the next requests for results go wrong: `lost`, `502`, `404`, `redirect`, `truncated`, `html`."""

    def __init__(
        self,
        *,
        token: str = DEFAULT_TOKEN,
        deployment_id: str = DEFAULT_DEPLOYMENT,
        workflow: Mapping[str, Any] | None = None,
        cold_start: Span = timedelta(minutes=4),
        keep_warm: Span = timedelta(seconds=60),
        max_instances: int = 1,
        hardware: str = "AMPERE_48",
        usd_per_hour: Decimal = Decimal("2.50"),
        comfyui_speed: float = 1.0,
        times: str = "naive",
        folder: Path | None = None,
        now: Callable[[], datetime] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        """Nothing listens before `start`.

        `workflow` is the deployment's saved graph, by default generate_flux_mesh2. `times` is how times are written:
        `naive`, `offset` or `zulu`. `now` is the cloud's clock, by default a stamp taken at the start plus loop time.
        """
        super().__init__(folder=folder, now=now, host=host, port=port)
        self.token, self.deployment_id = token, deployment_id
        self.workflow: dict[str, Any] = (
            dict(workflow) if workflow is not None else json.loads(workflows.load("generate_flux_mesh2")[0])
        )
        self.cold_start, self.keep_warm, self.max_instances = cold_start, keep_warm, max_instances
        self.hardware, self.usd_per_hour = hardware, usd_per_hour
        self.times = times
        self.gate, self.gate_status = None, 403
        self.british, self.tells_urls, self.deployment_told = False, True, True
        self.requests, self.instances = {}, []
        self.files, self.file_calls, self.file_faults = {}, [], []
        self._speed = comfyui_speed
        self._queue: list[EmulatedRequest] = []
        self._arrived = asyncio.Event()
        self._next_traits: list[RequestTraits] = []
        self._lives: set[asyncio.Task[None]] = set()
        self._errors: list[BaseException] = []
        self._results = Listener(self._serve_file, host=host)

    # --- life ---------------------------------------------------------------------------------------------

    async def start(self) -> str:
        """Listen, and return the API's base address. Harmless when repeated. Raises OSError if the port is taken."""
        self.now()
        await super().start()
        await self._results.start()
        return self.url

    async def stop(self) -> None:
        """End everything. Raises what went wrong in the emulator itself, if anything did."""
        self._closing.set()
        for task in list(self._lives):
            task.cancel()
        await asyncio.gather(*self._lives, return_exceptions=True)
        await self._results.stop()
        await super().stop()
        if self._errors:
            raise self._errors.pop()

    def environment(self) -> dict[str, str]:
        """Return the variables that point a client at this deployment."""
        return {
            "RUNCOMFY_API_BASE_URL": self.url,
            "RUNCOMFY_API_TOKEN": self.token,
            "RUNCOMFY_DEPLOYMENT_ID": self.deployment_id,
        }

    # --- the books ----------------------------------------------------------------------------------------

    @property
    def run_log(self) -> list[EmulatedRequest]:
        """Every request that was begun, oldest first."""
        begun = [request for request in self.requests.values() if request.started_at is not None]
        return sorted(begun, key=lambda request: request.started_at or request.created_at)

    @property
    def going_on(self) -> list[str]:
        """The requests that wait or run."""
        return [request.request_id for request in self.requests.values() if not request.over]

    @property
    def billing(self) -> list[str]:
        """The instances that are awake, or waking: those are billed."""
        return [instance.instance_id for instance in self.instances if instance.ended_at is None]

    @property
    def total_usd(self) -> Decimal:
        """What all instances cost so far, cold starts and warm times included."""
        now = self.now()
        return sum((instance.usd(now) for instance in self.instances), Decimal(0))

    # --- misbehaving --------------------------------------------------------------------------------------

    def next_request(self, **traits: Any) -> None:
        """Let the next request misbehave; the arguments are those of `RequestTraits`. Several calls queue up."""
        self._next_traits.append(RequestTraits(**traits))

    # --- the API ------------------------------------------------------------------------------------------

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        raw, body = await self._heard(request)
        route = self._route(request)
        known = route[0] if route else f"{request.method} {request.rel_url.raw_path_qs}"
        given = request.headers.get("Authorization", "")
        token = 1 if given == f"Bearer {self.token}" else None
        return await self._tell(
            request, known, body, token, lambda works: self._outcome(route, given, body, len(raw), works=works)
        )

    def _route(self, request: web.BaseRequest) -> tuple[str, str, str] | None:
        """Return the call by its short name, the deployment, and the request's id."""
        parts = [unquote(part) for part in request.rel_url.raw_path.strip("/").split("/")]
        if len(parts) < 4 or parts[0] != "prod" or parts[1] not in ("v1", "v2") or parts[2] != "deployments":
            return None
        deployment, rest = parts[3], parts[4:]
        match request.method, rest:
            case "POST", ["inference"]:
                return "POST inference", deployment, ""
            case "GET", ["requests", request_id, ("status" | "result") as verb]:
                return f"GET requests/{request_id}/{verb}", deployment, request_id
            case "POST", ["requests", request_id, "cancel"]:
                return f"POST requests/{request_id}/cancel", deployment, request_id
            case "GET", [] if parts[1] == "v2":
                return "GET deployment", deployment, ""
        return None

    def _outcome(self, route: tuple[str, str, str] | None, given: str, body: Any, size: int, *, works: bool) -> Outcome:
        """Do what is asked, or only say so if `works` is False."""
        if route is None:
            words = "Invalid key=value pair (missing equal-sign) in Authorization header" if given else ""
            return Outcome(403, {"message": words or "Missing Authentication Token"})
        if size > MAX_BODY:
            return Outcome(413, {"message": "Request Too Long"})
        if given != f"Bearer {self.token}":
            return _refused(401, 401001, "Unauthorized")
        call, deployment, request_id = route
        if deployment != self.deployment_id:
            return _refused(404, 404001, "Deployment not found")
        if call == "POST inference":
            return self._submit(body, works=works)
        if call == "GET deployment":
            return self._tell_deployment()
        request = self.requests.get(request_id)
        hidden = request.traits.hidden if request is not None else 0.0
        if request is None or asyncio.get_running_loop().time() - request.created_loop < hidden:
            return _refused(404, 404001, "Request not found")
        if call.endswith("/cancel"):
            return self._cancel(request, works=works)
        if call.endswith("/result"):
            return Outcome(200, result_of(request, times=self.times, british=self.british))
        ahead = self._queue.index(request) if request in self._queue else 0
        return Outcome(200, status_of(request, ahead, self._urls(request_id), british=self.british))

    def _tell_deployment(self) -> Outcome:
        if not self.deployment_told:
            return Outcome(403, {"message": "Missing Authentication Token"})
        return Outcome(
            200,
            {
                "id": self.deployment_id,
                "name": "emulated",
                "hardware": [self.hardware],
                "min_instances": 0,
                "max_instances": self.max_instances,
                "keep_warm_duration_in_seconds": in_seconds(self.keep_warm),
                "status": "standby",
                "is_enabled": self.gate not in (10001, 10002),
            },
        )

    def _submit(self, body: Any, *, works: bool) -> Outcome:
        if self.gate is not None:
            return _refused(self.gate_status, self.gate, NAMES[self.gate])
        wanted = body if isinstance(body, dict) else {}
        overrides, graph = wanted.get("overrides"), wanted.get("workflow_api_json")
        if not isinstance(overrides if graph is None else graph, dict):
            return _refused(422, 422001, "overrides: field required")
        merged = copy.deepcopy(graph) if graph is not None else copy.deepcopy(self.workflow)
        for node_id, change in (overrides or {}).items():
            inputs = change.get("inputs") if isinstance(change, dict) else None
            if node_id not in merged or not isinstance(inputs, dict):
                return _refused(422, 422001, f"overrides: there is no node {node_id}")
            unknown = set(inputs) - set(merged[node_id]["inputs"])
            if unknown:
                return _refused(422, 422001, f"overrides: node {node_id} has no input {min(unknown)}")
            merged[node_id]["inputs"].update(inputs)
        request_id = str(uuid4())
        if works:
            traits = self._next_traits.pop(0) if self._next_traits else RequestTraits()
            at = asyncio.get_running_loop().time()
            made = EmulatedRequest(request_id, overrides or {}, merged, self.now(), at, traits)
            self.requests[request_id] = made
            self._queue.append(made)
            self._wake()
        return Outcome(200, {"request_id": request_id, **(self._urls(request_id) if self.tells_urls else {})})

    def _cancel(self, request: EmulatedRequest, *, works: bool) -> Outcome:
        can = not request.over
        if works and can:
            request.cancel_wanted.set()
            if request in self._queue and not request.traits.ignores_cancel:
                self._queue.remove(request)
                request.state, request.finished_at = "canceled", self.now()
        if self.british:
            outcome = {"outcome": "cancelled" if can else "not_cancellable", "status": request.state}
            return Outcome(200, {"request_id": request.request_id, **outcome})
        word = "cancellation_requested" if can else "not_cancellable"
        return Outcome(202, {"request_id": request.request_id, "status": word})

    def _urls(self, request_id: str) -> dict[str, str]:
        base = f"{self.url}/prod/v2/deployments/{quote(self.deployment_id, safe='')}/requests/{request_id}"
        return {f"{verb}_url": f"{base}/{verb}" for verb in ("status", "result", "cancel")}

    # --- instances ----------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Let an instance serve what waits; wake one if none is free and there may be another."""
        self._arrived.set()
        awake = [instance for instance in self.instances if instance.ended_at is None]
        if len(awake) >= self.max_instances or len(awake) >= len(self._queue) + len(self._running()):
            return
        instance = EmulatedInstance(f"i-{uuid4().hex[:12]}", self.usd_per_hour, self.now())
        self.instances.append(instance)
        task = asyncio.create_task(self._live(instance), name=f"serverless {instance.instance_id}")
        self._lives.add(task)
        task.add_done_callback(self._lived)

    def _running(self) -> list[EmulatedRequest]:
        return [request for request in self.requests.values() if request.state == "in_progress"]

    def _lived(self, task: asyncio.Task[None]) -> None:
        self._lives.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._errors.append(error)

    async def _live(self, instance: EmulatedInstance) -> None:
        """An instance from its waking to its end."""
        from runcomfy.testing.emulators.comfyui import ComfyUIEmulator

        folder = self._room() / instance.instance_id
        folder.mkdir(parents=True)
        try:
            await asyncio.sleep(in_seconds(self.cold_start))
            comfyui = ComfyUIEmulator(folder=folder, speed=self._speed, now=lambda: self.now().timestamp())
            async with comfyui, aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as http:
                instance.ready_at = self.now()
                runner = Runner(comfyui.url, http, look_every=0.5 / max(self._speed, 1.0))
                while (request := await self._next_for(instance)) is not None:
                    if not await self._run(request, instance, runner):
                        return
        finally:
            instance.ended_at = self.now()
            if self._queue and not self._closing.is_set():
                self._wake()

    async def _next_for(self, instance: EmulatedInstance) -> EmulatedRequest | None:
        """Return what is to be run next; None if nothing came while the instance was kept warm."""
        while not self._queue:
            self._arrived.clear()
            try:
                async with asyncio.timeout(in_seconds(self.keep_warm)):
                    await self._arrived.wait()
            except TimeoutError:
                return None
        request = self._queue.pop(0)
        request.state, request.instance_id, request.started_at = "in_progress", instance.instance_id, self.now()
        return request

    async def _run(self, request: EmulatedRequest, instance: EmulatedInstance, runner: Runner) -> bool:
        """Run a request; whether the instance survives it."""
        traits = request.traits
        try:
            files, cached = await runner.run(request)
        except Failed as failure:
            request.fail(failure.code, failure.words)
        except Canceled:
            request.state = "canceled"
        else:
            if traits.crashes:
                request.fail(10012, traits.words or "the request was lost")
            elif traits.fails is not None:
                request.fail(traits.fails, traits.words or NAMES.get(traits.fails, ""))
            else:
                self._deliver(request, files, without_urls=traits.without_urls or cached)
        request.finished_at = self.now()
        return not traits.crashes

    def _deliver(self, request: EmulatedRequest, files: Files, *, without_urls: bool) -> None:
        request.state = "succeeded"
        for number, (node, channel, file, content) in enumerate(files):
            if request.traits.only is not None and node not in request.traits.only:
                continue
            shown = dict(file)
            if not without_urls:
                path = f"/{request.request_id}/{number}/{quote(str(file['filename']))}"
                self.files[path] = _spoiled(content, request.traits.corrupt)
                shown["url"] = f"{self._results.url}{path}"
            named = request.traits.channel if channel == "3d" else channel
            request.outputs.setdefault(node, {}).setdefault(named, []).append(shown)
        if without_urls:
            words = "ComfyUI finished without yielding anything new"
            request.error = [{"error": NAMES[200001], "errorCode": 200001, "debugInfo": words}]

    # --- results ------------------------------------------------------------------------------------------

    async def _serve_file(self, request: web.BaseRequest) -> web.StreamResponse:
        path = request.rel_url.raw_path
        self.file_calls.append((path, dict(request.headers)))
        content = self.files.get(path)
        fault = self.file_faults.pop(0) if self.file_faults else ""
        if content is None or fault == "404":
            return web.Response(
                status=404, text="<Error><Code>NoSuchKey</Code></Error>", content_type="application/xml"
            )
        if fault == "redirect":
            return web.Response(status=302, headers={"Location": f"{self.url}/elsewhere"})
        if fault in ("502", "html"):
            return web.Response(status=502 if fault == "502" else 200, text=SPLASH, content_type="text/html")
        outcome = Outcome(200, content, {"Content-Type": "application/octet-stream"})
        return await send(request, outcome, reply=fault or None, closing=self._closing)


def _refused(status: int, code: int, words: str) -> Outcome:
    return Outcome(status, {"error_code": code, "error_message": words})


def _spoiled(content: bytes, how: str | None) -> bytes:
    return {"html": SPLASH.encode(), "empty": b"", "cut": content[: len(content) // 2]}.get(how or "", content)
