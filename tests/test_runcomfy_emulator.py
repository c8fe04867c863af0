"""The emulated cloud behaves as RunComfy's API reference says, and wrongly only when told to."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any
from urllib.request import urlopen

import aiohttp
import pytest
from aiohttp import web

from runcomfy.cli.emulator import environment_lines
from runcomfy.testing.clock import START
from runcomfy.testing.emulators.runcomfy import CallFault, EmulatedMachine, RunComfyEmulator, Stage

pytestmark = pytest.mark.cloud(comfyui=False)

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
FIELDS = [
    "server_id",
    "user_id",
    "server_type",
    "estimated_duration",
    "current_status",
    "main_service_url",
    "service_ready_at",
    "estimated_stopping_at",
]


class Caller:
    """Calls the API as a script would."""

    def __init__(self, cloud: RunComfyEmulator, http: aiohttp.ClientSession) -> None:
        self.cloud, self.http = cloud, http
        self.token: str | None = cloud.token

    async def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Return status and JSON; paths without a slash are below the user's prefix."""
        url = self.cloud.url + (path if path.startswith("/") else f"/prod/api/users/{self.cloud.user_id}/{path}")
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        async with self.http.request(method, url, json=body, headers=headers, allow_redirects=False) as response:
            text = await response.text()
            return response.status, json.loads(text) if text else None

    async def launch(self, duration: int = 600, server_type: str = "large") -> dict[str, Any]:
        version = self.cloud.workflows[0]["version_id"]
        body = {"workflow_version_id": version, "server_type": server_type, "estimated_duration": duration}
        status, machine = await self("POST", "servers", body)
        assert status == 200
        assert isinstance(machine, dict)
        return machine

    async def status(self, server_id: str) -> str | None:
        status, machine = await self("GET", f"servers/{server_id}")
        return machine["current_status"] if status == 200 else None

    async def listed(self) -> list[str]:
        return [machine["server_id"] for machine in (await self("GET", "servers"))[1]]


@pytest.fixture
async def call(cloud: RunComfyEmulator) -> AsyncIterator[Caller]:
    cloud.rate_limit = False
    async with aiohttp.ClientSession() as http:
        yield Caller(cloud, http)


# --- as documented -----------------------------------------------------------------------------------------


async def test_the_life_of_a_machine(call: Caller, cloud: RunComfyEmulator) -> None:
    machine = await call.launch()
    server_id = machine["server_id"]
    assert list(machine) == FIELDS
    assert machine["current_status"] == "Starting"
    assert [machine[name] for name in FIELDS[5:]] == [None, None, None]
    await asyncio.sleep(179)
    assert await call.status(server_id) == "Starting"
    assert cloud.billing == []
    await asyncio.sleep(2)
    _, ready = await call("GET", f"servers/{server_id}")
    assert list(ready) == FIELDS
    assert ready["current_status"] == "Ready"
    assert ready["main_service_url"].startswith("https://")
    assert STAMP.fullmatch(ready["service_ready_at"])
    begin, end = (datetime.fromisoformat(ready[name]) for name in FIELDS[6:])
    assert begin == START + timedelta(seconds=180)
    assert end - begin == timedelta(seconds=600)
    assert cloud.billing == [server_id]
    status, stopped = await call("DELETE", f"servers/{server_id}")
    assert (status, stopped["current_status"]) == (200, "Deleting")
    assert stopped["main_service_url"] == ready["main_service_url"]
    assert cloud.billing == []
    assert await call.listed() == [server_id]
    await asyncio.sleep(4)
    assert await call.status(server_id) is None
    assert await call.listed() == []
    assert (await call("DELETE", f"servers/{server_id}"))[0] == 404


async def test_the_bill_is_seconds_from_ready_to_the_stop(call: Caller, cloud: RunComfyEmulator) -> None:
    first = (await call.launch(3600, "large"))["server_id"]
    second = (await call.launch(3600, "medium"))["server_id"]
    await asyncio.sleep(180 + 721)
    await call("DELETE", f"servers/{first}")
    await asyncio.sleep(60)
    books = cloud.books
    assert books[first].seconds == 721
    assert books[first].usd == Decimal("0.350486")  # 721 s at 1.75 an hour
    assert books[second].ended_at is None
    assert books[second].usd == Decimal("0.214775")  # 781 s at 0.99 an hour
    assert cloud.total_usd == books[first].usd + books[second].usd
    _, money = await call("GET", "/prod/v2/balance")
    assert money == {"balance_usd": float(25 - cloud.total_usd), "currency": "USD"}
    _, bill = await call("GET", "/__emulator__/bill")
    assert bill["bills_now"] == [second]
    assert bill["total_usd"] == str(cloud.total_usd)
    assert [line["server_id"] for line in bill["machines"]] == [first, second]
    await call("DELETE", f"servers/{second}")


async def test_a_machine_stops_at_its_time_which_can_be_changed(call: Caller, cloud: RunComfyEmulator) -> None:
    server_id = (await call.launch(duration=300))["server_id"]
    path = f"servers/{server_id}/update-estimated-duration"
    assert (await call("POST", path, {"update_estimated_duration": 600}))[0] == 400  # not before it is ready
    await asyncio.sleep(180)
    await asyncio.sleep(290)
    status, changed = await call("POST", path, {"update_estimated_duration": 400})
    assert (status, changed["estimated_duration"]) == (200, 400)
    await asyncio.sleep(100)
    assert cloud.billing == [server_id]
    await asyncio.sleep(11)
    assert cloud.billing == []
    assert cloud.books[server_id].seconds == pytest.approx(Decimal(400), abs=Decimal("0.01"))
    assert await call.status(server_id) == "Deleting"


async def test_a_total_in_the_past_stops_at_once(call: Caller, cloud: RunComfyEmulator) -> None:
    server_id = (await call.launch())["server_id"]
    await asyncio.sleep(280)
    await call("POST", f"servers/{server_id}/update-estimated-duration", {"update_estimated_duration": 50})
    await asyncio.sleep(1)
    assert cloud.billing == []


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"server_type": "large", "estimated_duration": 600},
        {"workflow_version_id": "nope", "server_type": "large", "estimated_duration": 600},
        {"workflow_version_id": "V", "server_type": "huge", "estimated_duration": 600},
        {"workflow_version_id": "V", "server_type": "large", "estimated_duration": 0},
        {"workflow_version_id": "V", "server_type": "large", "estimated_duration": "600"},
        {"workflow_version_id": "V", "server_type": "large", "estimated_duration": True},
    ],
)
async def test_a_launch_must_be_well_formed(call: Caller, cloud: RunComfyEmulator, body: Any) -> None:
    if isinstance(body, dict) and body.get("workflow_version_id") == "V":
        body = {**body, "workflow_version_id": cloud.workflows[0]["version_id"]}
    status, answer = await call("POST", "servers", body)
    assert status == 400
    assert answer["message"]
    assert cloud.launched == []


async def test_the_account_runs_out_of_money(call: Caller, cloud: RunComfyEmulator) -> None:
    cloud.balance_usd = Decimal("0.10")
    server_id = (await call.launch(duration=3600))["server_id"]
    await asyncio.sleep(600)
    await call("DELETE", f"servers/{server_id}")
    version = cloud.workflows[0]["version_id"]
    body = {"workflow_version_id": version, "server_type": "large", "estimated_duration": 600}
    assert (await call("POST", "servers", body))[0] == 402


async def test_the_gateway_answers_for_paths_it_does_not_know(call: Caller, cloud: RunComfyEmulator) -> None:
    for method, path in [("GET", "machines"), ("PUT", "servers"), ("GET", "/prod/api/nothing"), ("GET", "/")]:
        call.token = cloud.token
        status, answer = await call(method, path)
        assert status == 403
        assert answer["message"].startswith("Invalid key=value pair (missing equal-sign) in Authorization header")
        assert cloud.token not in answer["message"]
        call.token = None
        assert await call(method, path) == (403, {"message": "Missing Authentication Token"})


@pytest.mark.cloud(second_token="other")
async def test_who_may_ask(call: Caller, cloud: RunComfyEmulator) -> None:
    for token, status in [(cloud.token, 200), ("other", 200), ("wrong", 401), (None, 401)]:
        call.token = token
        assert (await call("GET", "servers"))[0] == status
    call.token = cloud.token
    assert (await call("GET", "/prod/api/users/somebody/servers"))[0] == 403
    assert (await call("GET", "/api/auth/me"))[1]["id"] == cloud.user_id
    cloud.revoke(1)
    assert (await call("GET", "servers"))[0] == 401


async def test_about_one_request_a_second(call: Caller, cloud: RunComfyEmulator) -> None:
    cloud.rate_limit, cloud.burst, cloud._tokens_left = True, 3, 3.0
    cloud.retry_after = "2"
    assert [(await call("GET", "servers"))[0] for _ in range(4)] == [200, 200, 200, 429]
    status, answer = await call("GET", "servers")
    assert (status, answer["error_code"]) == (429, "rate_limited")
    await asyncio.sleep(2)
    assert [(await call("GET", "servers"))[0] for _ in range(3)] == [200, 200, 429]


@pytest.mark.cloud(boot_time=lambda: 42)
async def test_boot_times_may_be_asked_for_each_launch(call: Caller) -> None:
    server_id = (await call.launch(duration=10))["server_id"]
    await asyncio.sleep(43)
    assert await call.status(server_id) == "Ready"
    await asyncio.sleep(10)


def test_the_environment_points_at_the_cloud() -> None:
    cloud = RunComfyEmulator(second_token="b")
    cloud.url = "http://127.0.0.1:1"
    named = cloud.environment()
    assert named["RUNCOMFY_API_BASE_URL"] == cloud.url
    assert named["RUNCOMFY_API_TOKEN_2"] == "b"
    assert named["RUNCOMFY_WORKFLOW_VERSION_ID"] == cloud.workflows[0]["version_id"]


# --- misbehaving machines ----------------------------------------------------------------------------------


async def test_a_new_machine_may_be_invisible_for_a_while(call: Caller, cloud: RunComfyEmulator) -> None:
    cloud.next_machine(hidden_for=30, unlisted_for=timedelta(seconds=60))
    server_id = (await call.launch())["server_id"]
    assert (await call.status(server_id), await call.listed()) == (None, [])
    await asyncio.sleep(31)
    assert (await call.status(server_id), await call.listed()) == ("Starting", [])
    await asyncio.sleep(30)
    assert await call.listed() == [server_id]
    await call("DELETE", f"servers/{server_id}")


async def test_a_machine_may_start_for_ever_or_fail(call: Caller, cloud: RunComfyEmulator) -> None:
    cloud.next_machine(stuck=True)
    cloud.next_machine(fails=True)
    stuck, failed = (await call.launch())["server_id"], (await call.launch())["server_id"]
    await asyncio.sleep(7200)
    assert (await call.status(stuck), await call.status(failed)) == ("Starting", "Error")
    assert cloud.books[failed].usd == 0
    for server_id in (stuck, failed):
        await call("DELETE", f"servers/{server_id}")
    await asyncio.sleep(5)
    assert cloud.alive == []


async def test_a_machine_may_flap_vanish_or_linger(call: Caller, cloud: RunComfyEmulator) -> None:
    cloud.next_machine(flaps=10, vanishes_after=100, listed_after=60, listed_as="Stopped")
    server_id = (await call.launch())["server_id"]
    words = []
    await asyncio.sleep(185)
    for _ in range(4):
        words.append(await call.status(server_id))
        await asyncio.sleep(10)
    assert words == ["Ready", "Starting", "Ready", "Starting"]
    await asyncio.sleep(60)
    assert cloud.books[server_id].seconds == 100
    assert await call.status(server_id) == "Stopped"
    await asyncio.sleep(60)
    assert await call.status(server_id) is None


async def test_a_machine_may_ignore_its_stop_time_and_delete(call: Caller, cloud: RunComfyEmulator) -> None:
    cloud.next_machine(ignores_stop_time=True, ignores_delete=True)
    server_id = (await call.launch(duration=60))["server_id"]
    await asyncio.sleep(7200)
    assert cloud.billing == [server_id]
    status, machine = await call("DELETE", f"servers/{server_id}")
    assert (status, machine["current_status"]) == (200, "Deleting")
    await asyncio.sleep(60)
    assert await call.status(server_id) == "Ready"
    cloud.machines[server_id].traits.ignores_delete = False
    await call("DELETE", f"servers/{server_id}")


async def test_a_launch_may_answer_with_another_machines_id(call: Caller, cloud: RunComfyEmulator) -> None:
    first = (await call.launch())["server_id"]
    cloud.next_machine(answers_as=first)
    assert (await call.launch())["server_id"] == first
    assert len(set(cloud.launched)) == 2
    assert await call.listed() == cloud.launched
    for server_id in cloud.launched:
        await call("DELETE", f"servers/{server_id}")


async def test_foreign_machines_bill_on_their_own_account(call: Caller, cloud: RunComfyEmulator) -> None:
    stranger = cloud.foreign("medium", duration=100)
    assert await call.listed() == [stranger.server_id]
    assert (cloud.billing, cloud.launched, cloud.alive) == ([], [], [])
    await asyncio.sleep(101)
    assert cloud.books[stranger.server_id].seconds == 100
    assert cloud.total_usd == 0


# --- what listens at a machine's address -------------------------------------------------------------------


class Greeter:
    """A server that could be ComfyUI."""

    alive = 0

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            return web.json_response({"here": True})

        self._runner = web.ServerRunner(web.Server(answer, access_log=None))
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        Greeter.alive += 1
        return f"http://{host}:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        await self._runner.cleanup()
        Greeter.alive -= 1


async def knock(call: Caller, url: str) -> int | None:
    """The status at an address; None if nobody listens."""
    try:
        async with call.http.get(url, headers={"Connection": "close"}) as response:
            return response.status
    except aiohttp.ClientConnectionError:
        return None


@pytest.mark.cloud(comfyui_factory=lambda machine: Greeter())
@pytest.mark.parametrize(("manner", "first"), [("works", 200), ("refused", None), ("502", 502), ("html", 200)])
async def test_ready_need_not_mean_that_comfyui_answers(
    call: Caller, cloud: RunComfyEmulator, manner: str, first: int | None
) -> None:
    cloud.next_machine(comfyui=manner, comfyui_for=30)
    server_id = (await call.launch())["server_id"]
    await asyncio.sleep(181)
    url = (await call("GET", f"servers/{server_id}"))[1]["main_service_url"]
    assert await knock(call, url) == first
    assert Greeter.alive == (manner == "works")
    await asyncio.sleep(31)
    assert await knock(call, url) == 200
    assert Greeter.alive == 1
    await call("DELETE", f"servers/{server_id}")
    await asyncio.sleep(1)
    assert await knock(call, url) is None
    assert Greeter.alive == 0


@pytest.mark.cloud(comfyui=True)
async def test_a_ready_machine_runs_an_emulated_comfyui_without_a_token(call: Caller, cloud: RunComfyEmulator) -> None:
    server_id = (await call.launch())["server_id"]
    await asyncio.sleep(181)
    _, machine = await call("GET", f"servers/{server_id}")
    async with call.http.get(machine["main_service_url"] + "/system_stats") as response:
        assert response.status == 200
        assert (await response.json())["system"]["comfyui_version"]
    await call("DELETE", f"servers/{server_id}")
    await asyncio.sleep(1)
    assert await knock(call, machine["main_service_url"]) is None


async def test_what_breaks_in_the_emulator_itself_is_not_hidden() -> None:
    def broken(machine: EmulatedMachine) -> Greeter:
        raise RuntimeError("no server for you")

    cloud = RunComfyEmulator(comfyui_factory=broken)
    await cloud.start()
    async with aiohttp.ClientSession() as http:
        await Caller(cloud, http).launch()
    await asyncio.sleep(181)
    with pytest.raises(RuntimeError, match="no server for you"):
        await cloud.stop()
    await cloud.stop()


# --- misbehaving calls -------------------------------------------------------------------------------------


async def test_faults_meet_the_calls_they_name(call: Caller, cloud: RunComfyEmulator) -> None:
    cloud.next_call("GET servers/*", status=500)
    cloud.next_call("GET servers", status=418, times=2, skip=1)
    assert [(await call("GET", "servers"))[0] for _ in range(4)] == [200, 418, 418, 200]
    assert (await call("GET", "servers/x"))[0] == 500
    cloud.next_call(status=503, times=None)
    assert [(await call(method, "servers"))[0] for method in ("GET", "POST", "DELETE")] == [503, 503, 503]
    cloud.behave()
    assert (await call("GET", "servers"))[0] == 200


async def test_a_fault_may_last_for_hours(call: Caller, cloud: RunComfyEmulator) -> None:
    server_id = (await call.launch(duration=40_000))["server_id"]
    await asyncio.sleep(200)
    cloud.next_call("DELETE *", status=500, times=None, lasts=timedelta(hours=6))
    for _ in range(6):
        assert (await call("DELETE", f"servers/{server_id}"))[0] == 500
        await asyncio.sleep(3599)
    assert cloud.billing == [server_id]
    await asyncio.sleep(10)
    assert (await call("DELETE", f"servers/{server_id}"))[0] == 200


async def test_a_call_may_work_and_say_no_or_say_yes_and_not_work(call: Caller, cloud: RunComfyEmulator) -> None:
    server_id = (await call.launch())["server_id"]
    await asyncio.sleep(200)
    cloud.next_call("DELETE *", works=False)
    status, machine = await call("DELETE", f"servers/{server_id}")
    assert (status, machine["current_status"]) == (200, "Deleting")
    assert cloud.billing == [server_id]
    cloud.next_call("DELETE *", status=500, works=True)
    assert (await call("DELETE", f"servers/{server_id}"))[0] == 500
    assert cloud.billing == []
    cloud.next_call("POST servers", works=False)
    ghost = (await call.launch())["server_id"]
    await asyncio.sleep(200)
    assert await call.status(ghost) is None
    assert await call.listed() == []
    assert cloud.launched == [server_id]


@pytest.mark.parametrize("reply", ["lost", "reset", "truncated"])
async def test_answers_get_lost_after_the_work(call: Caller, cloud: RunComfyEmulator, reply: str) -> None:
    cloud.next_call("POST servers", reply=reply)
    with pytest.raises(aiohttp.ClientError):
        await call.launch()
    assert len(cloud.launched) == 1
    await call("DELETE", f"servers/{cloud.launched[0]}")


async def test_answers_come_late_never_or_in_drops(call: Caller, cloud: RunComfyEmulator, looptime: float) -> None:
    cloud.next_call("GET servers", delay=7)
    assert (await call("GET", "servers"))[0] == 200
    assert looptime == pytest.approx(7, abs=0.1)
    cloud.next_call("GET workflows", reply="drip", body=[1, 2])
    assert await call("GET", "workflows") == (200, [1, 2])
    assert 12 <= looptime <= 14
    cloud.next_call("GET servers", reply="never")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call("GET", "servers"), 100)


async def test_pages_and_wrapping(call: Caller, cloud: RunComfyEmulator) -> None:
    ids = [cloud.foreign().server_id for _ in range(3)]
    cloud.next_call("GET servers", wrap="data")
    assert [machine["server_id"] for machine in (await call("GET", "servers"))[1]["data"]] == ids
    cloud.page_size = 2
    _, first = await call("GET", "servers")
    assert [machine["server_id"] for machine in first["servers"]] == ids[:2]
    _, second = await call("GET", first["next"])
    assert [machine["server_id"] for machine in second["servers"]] == ids[2:]
    assert (second["next"], second["total"]) == (None, 3)


def test_a_fault_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="no reply"):
        CallFault(reply="dances")


async def test_faults_can_be_switched_from_another_process(call: Caller, cloud: RunComfyEmulator) -> None:
    async def switch(body: object) -> int:
        return (await call("POST", "/__emulator__/faults", body))[0]

    assert await switch({"next_call": {"call": "GET servers", "status": 500}, "foreign": {}}) == 200
    assert (await call("GET", "servers"))[0] == 500
    assert len(await call.listed()) == 1
    assert await switch({"next_machine": {"stuck": True}}) == 200
    server_id = (await call.launch())["server_id"]
    await asyncio.sleep(300)
    assert await call.status(server_id) == "Starting"
    assert await switch({"revoke": 1}) == 200
    assert (await call("GET", "servers"))[0] == 401
    assert await switch({"clear": True}) == 200
    assert (await call("DELETE", f"servers/{server_id}"))[0] == 200
    for wrong in ({"next_call": {"no": 1}}, {"nonsense": 1}, {"next_call": {"reply": "dances"}}):
        assert await switch(wrong) == 400
    assert (await call("GET", "/__emulator__/nothing"))[0] == 404


async def test_every_call_is_kept(call: Caller, cloud: RunComfyEmulator) -> None:
    await call("GET", "workflows")
    await asyncio.sleep(5)
    await call("POST", "servers", {"a": 1})
    assert [(record.method, record.path, record.token) for record in cloud.calls] == [
        ("GET", "workflows", 1),
        ("POST", "servers", 1),
    ]
    assert cloud.calls[1].body == {"a": 1}
    assert all(after.at - before.at >= timedelta(seconds=5) for before, after in pairwise(cloud.calls))


async def test_without_a_clock_stamps_begin_at_the_real_time() -> None:
    before = datetime.now(UTC)
    async with RunComfyEmulator(comfyui=False) as cloud:
        first = cloud.now()
        await asyncio.sleep(100)
        assert timedelta(seconds=100) <= cloud.now() - first < timedelta(seconds=101)
    assert before <= first <= datetime.now(UTC)


async def test_a_taken_port_is_said_so(cloud: RunComfyEmulator) -> None:
    port = int(cloud.url.rpartition(":")[2])
    with pytest.raises(OSError, match=r"address already in use|10048"):
        await RunComfyEmulator(port=port).start()


def test_stages_are_the_words_of_the_api() -> None:
    assert [stage.value for stage in Stage][:3] == ["Starting", "Ready", "Deleting"]


# --- the command -------------------------------------------------------------------------------------------


def test_environment_lines_can_be_pasted() -> None:
    named = {"A": "http://127.0.0.1:1", "B": "it's"}
    assert environment_lines(named, form="posix") == "export A=http://127.0.0.1:1\nexport B='it'\"'\"'s'"
    assert environment_lines(named, form="powershell") == "$env:A = 'http://127.0.0.1:1'\n$env:B = 'it''s'"


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl+C cannot be sent to a child there")
def test_the_command_runs_until_ctrl_c() -> None:
    command = [sys.executable, "-c", "from runcomfy.cli.main import main; main()", "emulator", "--json", "--no-comfyui"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        named = json.loads(process.stdout.readline())
        with urlopen(f"{named['RUNCOMFY_API_BASE_URL']}/__emulator__/bill") as answer:  # noqa: S310 - loopback
            bill = json.load(answer)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert bill == {"emulated": True, "machines": [], "bills_now": [], "total_usd": "0"}
    assert "emulated" in said
    assert process.returncode == 0
