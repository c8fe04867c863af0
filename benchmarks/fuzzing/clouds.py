"""RunComfy's two APIs as a hostile cloud answers them: every call of both clients, over scripted answers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from benchmarks.fuzzing import running
from benchmarks.fuzzing.http import Script, ScriptedSession, script
from benchmarks.fuzzing.scratch import scratch
from benchmarks.fuzzing.target import TOKEN, USER_ID, Seeds, Target, demand, only_ours, plain, without_secrets
from runcomfy.adapters.providers.limits import retry_after
from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient
from runcomfy.adapters.providers.runcomfy_serverless import RunComfyServerless
from runcomfy.domain.balance import Balance
from runcomfy.domain.machine import CloudWorkflow, MachineReport, Phase, ServerId
from runcomfy.domain.money import show_usd
from runcomfy.domain.secret import Secret, SecretUrl
from runcomfy.domain.serverless import (
    DeploymentView,
    Fault,
    RemoteFile,
    RequestId,
    RequestReport,
    RequestResult,
    RequestState,
    Submitted,
    outcome,
)
from runcomfy.domain.settings import CloudSettings, ComfySettings, ServerlessSettings
from runcomfy.testing.clock import START, LoopClock

SERVER: Final = ServerId("srv-77aa55")
REQUEST: Final = RequestId("req-77aa55")
HOME: Final = "api.runcomfy.net"
CLOUD: Final = CloudSettings(
    user_id=USER_ID,
    tokens=(Secret(TOKEN), Secret(TOKEN + "-2")),
    max_retries=2,
    requests_per_second=1_000.0,
    burst=1_000,
)
SERVERLESS: Final = ServerlessSettings(deployment_id="dep-1")
FAR: Final = timedelta(days=400 * 365)
"""What lies farther away cannot be reckoned with: sums with it leave the calendar."""


class _Ears(logging.Handler):
    """Hears everything that our loggers say."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(f"{record.getMessage()} {record.__dict__.get('fields')!r}")


_ears: _Ears | None = None


def heard() -> list[str]:
    """Begin to listen, or return what was said since the last call."""
    global _ears  # noqa: PLW0603 - there is one logger, too
    logger = logging.getLogger("runcomfy")
    if _ears is None:
        _ears = _Ears()
    if _ears not in logger.handlers:
        logger.addHandler(_ears)
        logger.propagate = False
        logger.setLevel(logging.INFO)
    told, _ears.told = _ears.told, []
    return told


def _quiet() -> None:
    for line in heard():
        without_secrets(line, "the log")


# --- the machines -------------------------------------------------------------------------------------------


def _moment(at: datetime | None, what: str) -> None:
    demand(at is None or abs(at - START) < FAR, f"{what} is {at}: nothing can be reckoned with it")


def _machine(report: MachineReport | None) -> None:
    if report is None:
        return
    demand(isinstance(report.phase, Phase), "a phase that is none")
    demand(0 < len(report.server_id) <= 200 and report.server_id.isascii(), f"an id {report.server_id!r}")
    demand(not set(report.server_id) & set("/\\?#% "), f"an id that leads elsewhere: {report.server_id!r}")
    for text, what in ((report.status, "status"), (report.server_type, "type"), (report.workflow_version_id, "id")):
        plain(text, what, limit=256)
    demand(report.duration is None or timedelta(0) < report.duration < FAR, f"a duration of {report.duration}")
    _moment(report.ready_at, "the ready time")
    _moment(report.stopping_at, "the stopping time")
    if report.url is not None:
        address = report.url.reveal()
        demand(address.lower().startswith(("http://", "https://")) and address.isprintable(), f"an address {address!r}")
        host, _, _ = (address.partition("://")[2]).partition(".")
        demand(len(host) < 12 or host not in repr(report.url) + f"{report.url}", "an address is shown")


def _machines(reports: Any) -> None:
    demand(len({r.server_id for r in reports}) == len(reports), "a machine is listed twice")
    for report in reports:
        _machine(report)


def _workflows(found: Any) -> None:
    for workflow in found:
        demand(isinstance(workflow, CloudWorkflow), "no workflow")
        for text in (workflow.workflow_id, workflow.name, workflow.version_id, workflow.created_at):
            plain(text, "a workflow's word", limit=256)


def _money(balance: Balance | None) -> None:
    if balance is not None:
        demand(balance.usd.is_finite(), "a balance that is no amount")
        demand(len(format(balance.usd, "f")) < 60, "a balance of endless digits")
        demand(len(show_usd(balance.usd)) < 60, "a balance that cannot be shown")


def _word(text: str | None) -> None:
    if text is not None:
        plain(text, "the user's id", limit=256)


def _truth(value: object) -> None:
    demand(isinstance(value, bool), "neither yes nor no")


Ask = Callable[[RunComfyAPIClient], Awaitable[Any]]
_CALLS: Final[Mapping[str, tuple[Ask, Callable[[Any], None]]]] = {
    "list_machines": (lambda cloud: cloud.list_machines(), _machines),
    "get_workflows": (lambda cloud: cloud.get_workflows(), _workflows),
    "launch": (
        lambda cloud: cloud.launch_machine(
            server_type="medium", duration=timedelta(minutes=10), workflow_version_id="v1"
        ),
        _machine,
    ),
    "status": (lambda cloud: cloud.get_machine_status(SERVER), _machine),
    "duration": (lambda cloud: cloud.change_duration(SERVER, total=timedelta(minutes=20)), _machine),
    "stop": (lambda cloud: cloud.stop_machine(SERVER), _truth),
    "balance": (lambda cloud: cloud.balance(), _money),
    "whoami": (lambda cloud: cloud.whoami(), _word),
    "probe": (lambda cloud: cloud.probe_host(), lambda nothing: demand(nothing is None, "an answer")),
}


async def _ask_cloud(told: Script) -> None:
    name = told.ask if told.ask in _CALLS else sorted(_CALLS)[sum(map(ord, told.ask)) % len(_CALLS)]
    ask, judge = _CALLS[name]
    home = "www.runcomfy.com" if name == "whoami" else HOME
    http: Any = ScriptedSession(told.answers, home)
    cloud = RunComfyAPIClient(CLOUD, clock=LoopClock(), http=http)
    with only_ours():
        judge(await ask(cloud))
    if name == "launch":
        sent = sum(1 for answer in told.answers[: len(http.asked)] if answer.status == 200)
        demand(sent <= 1, "a launch was repeated after an answer")


def provider(data: bytes) -> None:
    """The Server API."""
    heard()
    running.run(_ask_cloud(Script.read(data)))
    _quiet()


MACHINE_JSON: Final = {
    "user_id": "u",
    "server_id": SERVER,
    "current_status": "Ready",
    "workflow_version_id": "v1",
    "server_type": "medium",
    "estimated_duration": 3600,
    "main_service_url": "https://hidden-label-77aa55-comfyui.runcomfy.com",
    "service_ready_at": "2026-11-20T10:03:00.123456+00:00",
    "estimated_stopping_at": "2026-11-20T11:03:00Z",
}


def _provider_seeds() -> Iterator[tuple[str, bytes]]:
    one, many = json.dumps(MACHINE_JSON).encode(), json.dumps([MACHINE_JSON]).encode()
    kind = "Content-Type: application/json"
    for name in _CALLS:
        yield f"{name}-one", script(name, (200, kind, one))
        yield f"{name}-refused", script(name, (401, kind, b'{"message": "Unauthorized"}'), (403, kind, b"{}"))
        yield f"{name}-none", script(name, (404, kind, b'{"message": "no such machine"}'))
        yield f"{name}-busy", script(name, (429, "Retry-After: 5", b""), (503, "Retry-After: 7", b""), (200, kind, one))
        yield f"{name}-page", script(name, (200, "Content-Type: text/html", b"<!doctype html><html>hello</html>"))
        yield f"{name}-broken", script(name, (0, "", b""), (200, kind, one))
    workflow = {"workflow_id": "w", "workflow_name": "Flux", "version_id": "v1", "created_at": "2026-01-01"}
    yield "workflows", script("get_workflows", (200, kind, json.dumps([workflow]).encode()))
    yield "list", script("list_machines", (200, kind, many))
    paged = {"servers": [MACHINE_JSON], "next": "/prod/api/users/x/servers?page=2", "total": 2, "pagination": {}}
    other = {**MACHINE_JSON, "server_id": "b-1"}
    yield (
        "pages",
        script(
            "list_machines",
            (200, kind, json.dumps(paged).encode()),
            (200, kind, json.dumps({"data": [other]}).encode()),
        ),
    )
    counted = {"data": {"items": [MACHINE_JSON], "page": 1, "pages": 2, "total_count": 2, "has_more": True}}
    yield "counted", script("list_machines", (200, kind, json.dumps(counted).encode()))
    yield "next-address-that-is-none", script("list_machines", (200, kind, b'{"servers": [], "next": "http://[x"}'))
    yield "wrapped-deep", script("list_machines", (200, kind, b'{"data":' * 900 + b"[]" + b"}" * 900))
    yield "balance", script("balance", (200, kind, b'{"balance_usd": 12.5, "currency": "USD"}'))
    yield "balance-of-a-billion-digits", script("balance", (200, kind, b'{"balance_usd": "1e999999999"}'))
    yield "whoami", script("whoami", (200, kind, b'{"id": "u-1", "email": "a@b.c"}'))
    yield "an-error-with-200", script("list_machines", (200, kind, b'{"success": false, "error": {"message": "no"}}'))
    yield "a-name-of-ours", script("status", (400, kind, json.dumps({"message": f"{USER_ID} {TOKEN}"}).encode()))
    yield "no-credit", script("launch", (402, kind, b'{"message": "insufficient balance"}'))
    yield "no-machine", script("launch", (500, kind, b'{"message": "InsufficientInstanceCapacity"}'))
    yield "redirect", script("status", (302, "Location: https://[", b""))
    yield (
        "long-running",
        script("status", (200, kind, json.dumps({**MACHINE_JSON, "estimated_duration": 86_399_999_999_999}).encode())),
    )
    yield (
        "first-year",
        script(
            "status", (200, kind, json.dumps({**MACHINE_JSON, "service_ready_at": "0001-01-01T00:00:00Z"}).encode())
        ),
    )


# --- serverless ---------------------------------------------------------------------------------------------


def _submitted(found: Submitted) -> None:
    demand(0 < len(found.request_id) <= 200 and not set(found.request_id) & set("/?#% "), f"id {found.request_id!r}")


def _report(found: RequestReport) -> None:
    demand(isinstance(found.state, RequestState), "a state that is none")
    plain(found.word, "a status", limit=60)
    plain(found.instance_id, "an instance", limit=256)


def _result(found: RequestResult) -> None:
    demand(isinstance(found.state, RequestState), "a state that is none")
    demand(len(found.files) <= 1_000 and len(found.faults) <= 21, "endless files or faults")
    _moment(found.created_at, "the start")
    _moment(found.finished_at, "the end")
    for fault in found.faults:
        demand(isinstance(fault, Fault), "no fault")
        plain(fault.name, "a fault's name", limit=256)
        plain(fault.words, "a fault's words", limit=256)
    for file in found.files:
        plain(file.channel, "a channel", limit=256)
        plain(file.type, "a type", limit=256)
        demand(len(file.filename) <= 4096 and len(file.node) <= 200, "endless names")
    error = outcome(found)
    if error is not None:
        plain(error.message, "what went wrong")


def _deployment(found: DeploymentView | None) -> None:
    if found is not None:
        plain(found.name, "a deployment's name", limit=256)
        for name in found.hardware:
            plain(name, "hardware", limit=60)
        demand(found.keep_warm is None or timedelta(0) <= found.keep_warm < FAR, "warm for ever")


ASKED: Final = Submitted(REQUEST, status_url=f"https://{HOME}/prod/v2/deployments/dep-1/requests/{REQUEST}/status")
_FILE: Final = RemoteFile("9", "images", "a.png", url=SecretUrl("https://files.runcomfy.net/a.png"))


async def _fetched(client: RunComfyServerless) -> None:
    target = scratch() / "fetched"
    target.unlink(missing_ok=True)
    whole = False
    try:
        found = await client.fetch(_FILE, str(target))
        whole = True
        demand(found.size_bytes == target.stat().st_size, "another size than was fetched")
    finally:
        demand(whole or not target.exists(), "a part of a file was left")
        target.unlink(missing_ok=True)


_SERVERLESS: Final[Mapping[str, tuple[Callable[[RunComfyServerless], Awaitable[Any]], Callable[[Any], None]]]] = {
    "submit": (lambda client: client.submit({"6": {"inputs": {"text": "a"}}}), _submitted),
    "status": (lambda client: client.status(ASKED), _report),
    "result": (lambda client: client.result(ASKED), _result),
    "cancel": (lambda client: client.cancel(ASKED), _truth),
    "deployment": (lambda client: client.deployment(), _deployment),
    "fetch": (_fetched, lambda nothing: None),
}


async def _ask_serverless(told: Script) -> None:
    name = told.ask if told.ask in _SERVERLESS else sorted(_SERVERLESS)[sum(map(ord, told.ask)) % len(_SERVERLESS)]
    ask, judge = _SERVERLESS[name]
    http: Any = ScriptedSession(told.answers, HOME)
    files = ComfySettings(max_retries=1, max_output_bytes=65_536)
    client = RunComfyServerless(SERVERLESS, CLOUD, clock=LoopClock(), files=files, http=http)
    with only_ours():
        found = await ask(client)
        judge(found)
        if isinstance(found, Submitted):
            with only_ours():
                _report(await client.status(found))


def serverless(data: bytes) -> None:
    """The serverless API."""
    heard()
    running.run(_ask_serverless(Script.read(data)))
    _quiet()


def _serverless_seeds() -> Seeds:
    kind = "Content-Type: application/json"
    taken = {
        "request_id": REQUEST,
        "status_url": f"https://{HOME}/prod/v2/deployments/dep-1/requests/{REQUEST}/status",
        "result_url": f"https://{HOME}/x/result",
        "cancel_url": "https://[",
    }
    state = {"request_id": REQUEST, "status": "in_queue", "queue_position": 2, "instance_id": "i-1"}
    result = {
        "request_id": REQUEST,
        "status": "succeeded",
        "created_at": "2026-11-20T10:00:00Z",
        "finished_at": "2026-11-20T10:00:09",
        "outputs": {"9": {"images": [{"url": "https://x.runcomfy.net/a.png", "filename": "a.png", "type": "output"}]}},
    }
    failed = {
        "request_id": REQUEST,
        "status": "failed",
        "error": [
            {"error": "OOM", "errorCode": 520001, "debugInfo": "CUDA out of memory", "details": [{"message": "x"}]}
        ],
    }
    deployment = {
        "id": "dep-1",
        "name": "flux",
        "hardware": ["AMPERE_24"],
        "is_enabled": True,
        "min_instances": 0,
        "keep_warm_duration_in_seconds": 60,
    }
    for name, answer in {
        "submit": taken,
        "status": state,
        "result": result,
        "cancel": {"request_id": REQUEST, "outcome": "cancelled"},
        "deployment": deployment,
    }.items():
        yield name, script(name, (200, kind, json.dumps(answer).encode()))
        refusal = {"error_code": 403003, "error": "forbidden", "details": {"message": "another's"}}
        yield f"{name}-refused", script(name, (200, kind, json.dumps(refusal).encode()))
        yield f"{name}-none", script(name, (404, kind, b'{"detail": "Not Found"}'))
        yield (
            f"{name}-broken",
            script(name, (0, "", b""), (502, "", b"<html>"), (200, kind, json.dumps(answer).encode())),
        )
    yield "failed", script("result", (200, kind, json.dumps(failed).encode()))
    yield "fetch", script("fetch", (200, "Content-Type: image/png|Content-Length: 9", b"\x89PNG12345"))
    yield "fetch-cut", script("fetch", (200, "Content-Length: 90", b"\x89PNG"), (404, "", b""))
    yield "fetch-large", script("fetch", (200, "", b"a" * 66_000))


# --- what headers ask for -----------------------------------------------------------------------------------


def retry(data: bytes) -> None:
    """`Retry-After` and `Date` of a 429."""
    first, _, second = data.decode("utf-8", "surrogateescape").partition("\n")
    headers = {"Retry-After": first, "Date": second}
    cap = timedelta(seconds=60)
    wait = retry_after(headers, now=START, cap=cap)
    demand(wait is None or (timedelta(0) <= wait <= cap and math.isfinite(wait.total_seconds())), f"a wait of {wait}")


def _retry_seeds() -> Seeds:
    for number, text in enumerate(
        (
            "5",
            "0",
            "-1",
            "1e9",
            "nan",
            "inf",
            "1_0",
            "Sun, 22 Nov 2026 12:00:05 GMT\nSun, 22 Nov 2026 12:00:00 GMT",
            "Sunday, 22-Nov-26 12:00:05 GMT",
            "Fri, 31 Dec 9999 23:59:59 -2359",
            "Mon, 1 Jan 0001 00:00:00 +2359",
            "Sun Nov 22 12:00:00 2026",
        )
    ):
        yield f"{number:02}", text.encode()


TARGETS: Final = (
    Target(
        "provider",
        provider,
        _provider_seeds,
        share=90,
        words=(
            "server_id",
            "current_status",
            "main_service_url",
            "estimated_duration",
            "service_ready_at",
            "estimated_stopping_at",
            "next_page_token",
            "has_more",
            "total_pages",
            "pagination",
            "balance_usd",
            "error_code",
            "list_machines",
            "Retry-After: ",
        ),
    ),
    Target(
        "serverless",
        serverless,
        _serverless_seeds,
        share=70,
        words=(
            "request_id",
            "status_url",
            "queue_position",
            "outputs",
            "errorCode",
            "debugInfo",
            "keep_warm_duration_in_seconds",
            "not_cancellable",
        ),
    ),
    Target("retry_after", retry, _retry_seeds, share=20, max_bytes=256, is_json=False),
)
