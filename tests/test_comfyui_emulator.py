"""The emulated ComfyUI does on request what real servers, proxies and networks do wrong, and keeps honest books."""

from __future__ import annotations

import asyncio
import io
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from PIL import Image

from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, Fault, PromptFault, SocketFault, corruption, faults
from runcomfy.testing.emulators.comfyui.nodes.base import InputSpec, NodeClass, NodeContext, NodeResult

Messages = list[dict[str, Any]]


async def _steps(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    for step in range(inputs["steps"]):
        await context.sleep(1.0)
        await context.progress(step + 1, inputs["steps"])
    return NodeResult((inputs["steps"],))


async def _save(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    place = context.save_path("made")
    name = place.name(".png")
    await context.in_thread(Image.new("RGB", (8, 8), (inputs["value"], 0, 0)).save, place.folder / name)
    return NodeResult(ui={"images": [place.reference(name)]})


async def _say(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    return NodeResult(ui={"text": ["x" * inputs["length"]]})


NODES = {
    "Say": NodeClass("Say", _say, InputSpec({"length": ["INT", {}]}), output_node=True),
    "Steps": NodeClass("Steps", _steps, InputSpec({"steps": ["INT", {"min": 1}]}), ("INT",)),
    "Save": NodeClass("Save", _save, InputSpec({"value": ["INT", {}]}), output_node=True),
}
BIG = bytes(range(256)) * 400


def graph(steps: int = 3) -> dict[str, Any]:
    return {
        "1": {"class_type": "Steps", "inputs": {"steps": steps}},
        "2": {"class_type": "Save", "inputs": {"value": ["1", 0]}},
    }


class Client:
    """The little that these stories need of a client."""

    def __init__(self, http: aiohttp.ClientSession, comfyui: ComfyUIEmulator) -> None:
        self.http = http
        self.comfyui = comfyui

    async def queue(self, client_id: str | None = "me", **more: Any) -> str:
        body = {"prompt": more.pop("graph", graph()), **({"client_id": client_id} if client_id else {}), **more}
        async with self.http.post("/prompt", json=body) as response:
            assert response.status == 200, await response.text()
            return str((await response.json())["prompt_id"])

    async def get(self, path: str) -> Any:
        async with self.http.get(path) as response:
            assert response.status == 200
            return await response.json()

    async def listen(self, socket: aiohttp.ClientWebSocketResponse, *, seconds: float = 30) -> Messages:
        """Everything until the end of a prompt, or of patience, or of the socket."""
        heard: Messages = []
        try:
            async with asyncio.timeout(seconds):
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        heard.append(json.loads(message.data))
                        if heard[-1]["type"] == "executing" and heard[-1]["data"].get("node") is None:
                            return heard
        except TimeoutError:
            pass
        return heard


@pytest.fixture
async def comfyui() -> AsyncIterator[ComfyUIEmulator]:
    async with ComfyUIEmulator(nodes=NODES) as emulator:
        yield emulator


@pytest.fixture
async def client(comfyui: ComfyUIEmulator) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(comfyui.url) as http:
        yield Client(http, comfyui)


def types(messages: Messages) -> list[str]:
    return [message["type"] for message in messages]


# Books


async def test_the_books_say_what_really_ran(client: Client, comfyui: ComfyUIEmulator) -> None:
    async with client.http.ws_connect("/ws?clientId=me") as socket:
        first = await client.queue()
        await client.listen(socket)
        again = await client.queue()
        await client.listen(socket)

    ran, cached = comfyui.run_log
    assert (ran.prompt_id, ran.client_id, ran.boot, ran.outcome, ran.nodes) == (first, "me", 1, "success", ["1", "2"])
    assert (cached.prompt_id, cached.nodes, cached.cached) == (again, [], ["1", "2"])
    assert comfyui.count("POST", "/prompt") == 2
    assert comfyui.boots == 1


async def test_it_says_that_it_is_an_emulator(client: Client) -> None:
    async with client.http.get("/system_stats") as response:
        assert response.headers["X-Emulator"] == "runcomfy-testing"
        assert "--emulated" in (await response.json())["system"]["argv"]


async def test_work_takes_the_loops_time_and_speed_divides_it() -> None:
    loop = asyncio.get_running_loop()
    took = {}
    for speed in (1.0, 10.0):
        async with (
            ComfyUIEmulator(nodes=NODES, speed=speed) as comfyui,
            aiohttp.ClientSession(comfyui.url) as http,
            http.ws_connect("/ws?clientId=me") as socket,
        ):
            client = Client(http, comfyui)
            began = loop.time()
            await client.queue(graph=graph(10))
            await client.listen(socket)
            took[speed] = loop.time() - began
    assert 10 <= took[1.0] < 11
    assert 1 <= took[10.0] < 2


# Life


async def test_a_kill_takes_queue_history_and_cache_and_leaves_the_files(
    client: Client, comfyui: ComfyUIEmulator
) -> None:
    async with client.http.ws_connect("/ws?clientId=me") as socket:
        done = await client.queue()
        await client.listen(socket)
        lost = await client.queue(graph=graph(50))
        await asyncio.sleep(5)
        await comfyui.kill()
        assert (await client.listen(socket))[-1]["type"] == "progress"
        assert socket.close_code == 1006
        with pytest.raises(aiohttp.ClientConnectorError):
            await client.get("/prompt")

    await comfyui.restart()

    assert await client.get("/history") == {}
    assert await client.get("/queue") == {"queue_running": [], "queue_pending": []}
    async with client.http.get("/view", params={"filename": "made_00001_.png"}) as response:
        assert response.status == 200
    assert [(record.prompt_id, record.outcome) for record in comfyui.run_log] == [(done, "success"), (lost, "lost")]
    assert comfyui.boots == 2


async def test_a_hanging_server_keeps_its_connections_and_answers_nothing(
    client: Client, comfyui: ComfyUIEmulator
) -> None:
    async with client.http.ws_connect("/ws?clientId=me") as socket:
        await client.queue(graph=graph(5))
        await asyncio.sleep(1.5)
        comfyui.hang()
        before = await client.listen(socket, seconds=60)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                await client.get("/prompt")
        assert not socket.closed
        comfyui.resume()
        after = await client.listen(socket)
    assert [m["data"]["value"] for m in before + after if m["type"] == "progress"] == [1, 2, 3, 4, 5]


async def test_a_dead_worker_leaves_a_server_that_still_says_yes(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.kill_worker()
    prompt_id = await client.queue()
    await asyncio.sleep(600)
    queue = await client.get("/queue")
    assert queue["queue_running"] == []
    assert [item[1] for item in queue["queue_pending"]] == [prompt_id]
    assert comfyui.run_log == []


async def test_an_unhashable_client_id_ends_the_process(client: Client, comfyui: ComfyUIEmulator) -> None:
    async with client.http.ws_connect("/ws?clientId=me"):
        await client.queue(client_id=None, client_id_wrong=None, graph=graph(1))
        async with client.http.post("/prompt", json={"prompt": graph(1), "client_id": ["a"]}) as response:
            assert response.status == 200
        await asyncio.sleep(5)
    assert not comfyui.alive


# Prompts


@pytest.mark.parametrize("fault", [Fault.lost(), Fault.error(500, work=True), Fault.never()])
async def test_a_submission_may_fail_and_yet_be_queued(client: Client, comfyui: ComfyUIEmulator, fault: Fault) -> None:
    comfyui.faults.add("POST", "/prompt", fault)
    with pytest.raises((aiohttp.ClientError, TimeoutError, AssertionError)):
        async with asyncio.timeout(30):
            await client.queue()
    await asyncio.sleep(10)
    assert [record.outcome for record in comfyui.run_log] == ["success"]
    assert [submit.answered for submit in comfyui.submit_log] == [False]


@pytest.mark.parametrize("fault", [None, Fault.late(5), Fault(twice=True)])
async def test_a_submission_that_was_answered_well_is_known_as_that(
    client: Client, comfyui: ComfyUIEmulator, fault: Fault | None
) -> None:
    if fault is not None:
        comfyui.faults.add("POST", "/prompt", fault)
    await client.queue()
    assert [submit.answered for submit in comfyui.submit_log] == [True]


async def test_a_submission_may_be_queued_twice(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.add("POST", "/prompt", Fault(twice=True))
    prompt_id = await client.queue()
    await asyncio.sleep(30)
    assert [record.prompt_id for record in comfyui.run_log] == [prompt_id, prompt_id]


async def test_a_stalled_node_stands_where_it_was_told_to(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.stall_node("1", at=0.5)
    async with client.http.ws_connect("/ws?clientId=me") as socket:
        prompt_id = await client.queue(graph=graph(4))
        heard = await client.listen(socket, seconds=3_600)
        assert [m["data"]["value"] for m in heard if m["type"] == "progress"] == [1, 2]
        await client.http.post("/interrupt", json={"prompt_id": prompt_id})
        assert await client.listen(socket, seconds=3_600) == []
        comfyui.release_node("1")
        assert "execution_interrupted" in types(await client.listen(socket))


async def test_an_interrupt_may_be_ignored(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.ignore_interrupts = True
    async with client.http.ws_connect("/ws?clientId=me") as socket:
        await client.queue()
        await client.http.post("/interrupt")
        assert "execution_success" in types(await client.listen(socket))


async def test_history_comes_after_success_and_before_the_end_marker(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.hold_history(2.0)
    async with client.http.ws_connect("/ws?clientId=me") as socket:
        prompt_id = await client.queue(graph=graph(1))
        async for message in socket:
            heard = json.loads(message.data)
            if heard["type"] == "execution_success":
                assert await client.get(f"/history/{prompt_id}") == {}
            if heard["type"] == "executing" and heard["data"]["node"] is None:
                assert prompt_id in await client.get(f"/history/{prompt_id}")
                break


@pytest.mark.parametrize("how", ["waiting", "running", "start", "end"])
async def test_a_prompt_may_vanish_without_a_trace(client: Client, comfyui: ComfyUIEmulator, how: str) -> None:
    if how in ("start", "end"):
        comfyui.faults.add_prompt(PromptFault(vanish=how))
    else:
        await client.queue(graph=graph(9 if how == "waiting" else 1))
    prompt_id = await client.queue()
    await asyncio.sleep(2.5)
    if how in ("waiting", "running"):
        comfyui.vanish(prompt_id)
    await asyncio.sleep(30)
    assert await client.get(f"/history/{prompt_id}") == {}
    assert await client.get("/queue") == {"queue_running": [], "queue_pending": []}
    after = await client.queue(graph=graph(2))
    await asyncio.sleep(10)
    assert after in await client.get("/history")


async def test_a_success_may_have_no_outputs(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.add_prompt(PromptFault(no_outputs=True))
    prompt_id = await client.queue()
    await asyncio.sleep(10)
    entry = (await client.get(f"/history/{prompt_id}"))[prompt_id]
    assert entry["status"]["status_str"] == "success"
    assert entry["outputs"] == {}


# Versions


async def test_old_servers_lack_what_came_later() -> None:
    """0.3.40 has neither feature flags nor the new progress, and makes its own prompt ids."""
    async with (
        ComfyUIEmulator(nodes=NODES, version="0.3.40") as comfyui,
        aiohttp.ClientSession(comfyui.url) as http,
        http.ws_connect("/ws?clientId=me") as socket,
    ):
        client = Client(http, comfyui)
        await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        wanted = "11111111-1111-4111-8111-111111111111"
        prompt_id = await client.queue(prompt_id=wanted)
        heard = await client.listen(socket)
        assert prompt_id != wanted
        assert not {"feature_flags", "progress_state"} & set(types(heard))
        assert "create_time" not in (await client.get("/history"))[prompt_id]["prompt"][3]
        for path in ("/features", "/api/jobs", "/api/assets"):
            async with http.get(path) as response:
                assert response.status == 404, path
        assert (await client.get("/system_stats"))["system"]["comfyui_version"] == "0.3.40"


@pytest.mark.parametrize(("version", "outcome"), [("0.3.56", "interrupted"), ("0.3.57", "success")])
async def test_interrupts_of_old_servers_hit_whoever_runs(version: str, outcome: str) -> None:
    async with (
        ComfyUIEmulator(nodes=NODES, version=version) as comfyui,
        aiohttp.ClientSession(comfyui.url) as http,
    ):
        await Client(http, comfyui).queue()
        await asyncio.sleep(1.5)
        await http.post("/interrupt", json={"prompt_id": "somebody else's"})
        await asyncio.sleep(10)
        assert comfyui.run_log[0].outcome == outcome


@pytest.mark.parametrize(("version", "status"), [("0.3.64", 405), ("0.10.0", 405), ("0.25.0", 405), ("0.26.0", 200)])
async def test_cancelling_a_job_tells_new_servers_from_old(version: str, status: int) -> None:
    async with (
        ComfyUIEmulator(nodes=NODES, version=version) as comfyui,
        aiohttp.ClientSession(comfyui.url) as http,
        http.post("/api/jobs/anything/cancel") as response,
    ):
        assert response.status == status


# Answers and files


@pytest.fixture
def stored(comfyui: ComfyUIEmulator) -> bytes:
    """A picture in the output folder."""
    data = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(data, format="PNG")
    (comfyui.folders.output / "x.png").write_bytes(data.getvalue())
    (comfyui.folders.output / "big.bin").write_bytes(BIG)
    return data.getvalue()


async def fetch(client: Client, name: str = "x.png", **arguments: Any) -> bytes:
    async with client.http.get("/view", params={"filename": name}, **arguments) as response:
        return await response.read()


async def test_a_download_may_be_cut_and_can_be_resumed(
    client: Client, comfyui: ComfyUIEmulator, stored: bytes
) -> None:
    comfyui.faults.add("GET", "/view", Fault.cut(100))
    async with client.http.get("/view", params={"filename": "x.png"}) as response:
        assert response.content_length == len(stored)
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert await fetch(client, headers={"Range": "bytes=100-"}) == stored[100:]


async def test_a_cut_range_is_cut_within_the_range(client: Client, comfyui: ComfyUIEmulator, stored: bytes) -> None:
    comfyui.faults.add("GET", "/view", Fault.cut(10))
    async with client.http.get("/view", params={"filename": "x.png"}, headers={"Range": "bytes=100-"}) as response:
        assert response.status == 206
        assert response.content_length == len(stored) - 100
        assert await response.content.readexactly(10) == stored[100:110]


async def test_a_content_length_may_lie(client: Client, comfyui: ComfyUIEmulator, stored: bytes) -> None:
    comfyui.faults.add("GET", "/view", Fault.lying(len(stored) + 50))
    comfyui.faults.add("GET", "/view", Fault.lying(50))
    with pytest.raises(aiohttp.ClientPayloadError):
        await fetch(client)
    assert await fetch(client) == stored[:50]


@pytest.mark.parametrize("how", [corruption.bad_crc, corruption.cut_idat])
async def test_a_picture_may_arrive_broken(
    client: Client, comfyui: ComfyUIEmulator, stored: bytes, how: faults.Corruption
) -> None:
    comfyui.faults.add("GET", "/view", Fault.corrupted(how))
    broken = await fetch(client)
    with pytest.raises((OSError, SyntaxError)):
        Image.open(io.BytesIO(broken)).verify()
    assert await fetch(client) == stored


async def test_a_file_may_differ_at_every_read(client: Client, comfyui: ComfyUIEmulator, stored: bytes) -> None:
    comfyui.faults.add("GET", "/view", Fault.corrupted(corruption.other_bytes_each_time), times=3)
    reads = {await fetch(client) for _ in range(3)}
    assert len(reads) == 3
    assert {len(read) for read in reads} == {len(stored)}


async def test_a_body_may_come_in_drops(client: Client, comfyui: ComfyUIEmulator, stored: bytes) -> None:
    comfyui.faults.add("GET", "/view", Fault.slow(1_000))
    began = asyncio.get_running_loop().time()
    assert await fetch(client, "big.bin") == BIG
    assert asyncio.get_running_loop().time() - began >= len(BIG) / 1_000 - 1


async def test_a_body_may_never_end(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.add("GET", "/history", Fault.flood())
    async with client.http.get("/history") as response:
        assert len(await response.content.readexactly(3_000_000)) == 3_000_000


@pytest.mark.parametrize(("fault", "status"), [(Fault.page(), 200), (Fault.page(502), 502), (Fault.error(503), 503)])
async def test_something_else_may_answer(client: Client, comfyui: ComfyUIEmulator, fault: Fault, status: int) -> None:
    comfyui.faults.add("*", "/queue", fault, times=2)
    for path in ("/queue", "/api/queue"):
        async with client.http.get(path) as response:
            assert response.status == status
            assert not response.content_type.endswith("json")
    assert await client.get("/queue") == {"queue_running": [], "queue_pending": []}


async def test_a_captive_portal_answers_everything(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.add("*", "*", Fault.page(), times=math.inf)
    for path in ("/prompt", "/history/x", "/view?filename=x.png", "/api/jobs/x", "/nowhere"):
        async with client.http.get(path) as response:
            assert (response.status, response.content_type) == (200, "text/html")
    async with client.http.post("/prompt", json={"prompt": graph()}) as response:
        assert response.status == 200
    assert not comfyui.process.queue.remaining
    assert not comfyui.run_log


async def test_a_redirect_may_loop(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.add("GET", "/queue", Fault.redirected(), times=100)
    with pytest.raises(aiohttp.TooManyRedirects):
        await client.get("/queue")


@pytest.mark.parametrize("body", [faults.MALFORMED_JSON, faults.INVALID_UTF8, faults.NOT_A_NUMBER, faults.DEEP_NESTING])
async def test_a_body_may_be_anything(client: Client, comfyui: ComfyUIEmulator, body: bytes) -> None:
    comfyui.faults.add("GET", "/queue", Fault.saying(body))
    async with client.http.get("/queue") as response:
        assert await response.read() == body


async def test_an_upload_may_be_stored_short(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.add("POST", "/upload/image", Fault(keep=10))
    form = aiohttp.FormData()
    form.add_field("image", BIG, filename="big.bin")
    async with client.http.post("/upload/image", data=form) as response:
        assert (await response.json())["name"] == "big.bin"
    assert (comfyui.folders.input / "big.bin").read_bytes() == BIG[:10]


async def test_faults_may_wait_for_their_turn(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.add("GET", "/queue", Fault.error(503), skip=1)
    statuses = []
    for _ in range(3):
        async with client.http.get("/queue") as response:
            statuses.append(response.status)
    assert statuses == [200, 503, 200]


# Sockets


async def test_a_handshake_may_be_refused(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.add_socket(SocketFault(refuse=403))
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await client.http.ws_connect("/ws?clientId=me")
    assert refused.value.status == 403
    await (await client.http.ws_connect("/ws?clientId=me")).close()


async def test_a_socket_may_be_half_open(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.add_socket(SocketFault(silent_after=1))
    async with client.http.ws_connect("/ws?clientId=me", timeout=aiohttp.ClientWSTimeout(ws_close=1)) as socket:
        await client.queue()
        assert types(await client.listen(socket, seconds=600)) == ["status"]
        await socket.ping()
        assert not socket.closed
    assert [record.outcome for record in comfyui.run_log] == ["success"]


async def test_a_socket_may_be_cut_after_some_frames(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.add_socket(SocketFault(abort_after=5))
    async with client.http.ws_connect("/ws?clientId=me") as socket:
        await client.queue()
        assert len(await client.listen(socket)) == 5
        assert socket.close_code == 1006


async def test_sockets_may_be_closed_politely(client: Client, comfyui: ComfyUIEmulator) -> None:
    async with client.http.ws_connect("/ws?clientId=me") as socket:
        await client.queue()
        await asyncio.sleep(1.5)
        closing = asyncio.create_task(comfyui.close_sockets("me", code=1012))
        assert types(await client.listen(socket))[-1] == "progress"
        assert await closing == 1
        assert socket.close_code == 1012


async def test_frames_may_come_twice_in_other_order_and_with_strangers(
    client: Client, comfyui: ComfyUIEmulator
) -> None:
    comfyui.faults.add_socket(SocketFault(duplicate=True))
    comfyui.faults.add_socket(SocketFault(reorder=True))
    comfyui.faults.add_socket(SocketFault(foreign=True))
    heard: list[Messages] = []
    for client_id in ("a", "b", "c"):
        async with client.http.ws_connect(f"/ws?clientId={client_id}") as socket:
            assert await client.queue(client_id=client_id) != faults.FOREIGN_PROMPT
            heard.append(await client.listen(socket) if client_id != "c" else await client.listen(socket, seconds=9))
    twice, swapped, strange = heard
    assert types(twice)[:2] == ["status", "status"]
    assert types(swapped).index("execution_cached") < types(swapped).index("execution_start")
    assert faults.FOREIGN_PROMPT in {m["data"].get("prompt_id") for m in strange}


async def test_previews_may_flood_and_frames_may_be_huge(client: Client, comfyui: ComfyUIEmulator) -> None:
    comfyui.faults.add_socket(SocketFault(flood=20))
    async with client.http.ws_connect("/ws?clientId=me", max_msg_size=0) as socket:
        sizes = [len((await socket.receive()).data) for _ in range(20)]
        assert min(sizes) > 60_000
        await socket.receive()
        comfyui.faults.clear()
        comfyui.inject("me", bytes(100_000_000))
        received = [await socket.receive() for _ in range(21)]
        assert len(received[-1].data) == 100_000_000


async def test_any_frame_can_be_injected(client: Client, comfyui: ComfyUIEmulator) -> None:
    async with client.http.ws_connect("/ws?clientId=me") as socket:
        await socket.receive()
        comfyui.inject("me", '{"type": "executing", "data": NaN')
        assert (await socket.receive()).data == '{"type": "executing", "data": NaN'
        comfyui.inject("me", b'{"type": "\xff"}', text=True)
        assert (await socket.receive()).type in (aiohttp.WSMsgType.ERROR, aiohttp.WSMsgType.CLOSED)


async def test_a_large_output_is_one_frame(client: Client, comfyui: ComfyUIEmulator) -> None:
    """Recorded from a real server: a text of 3 MB came as one frame of 3 MB."""
    async with client.http.ws_connect("/ws?clientId=me", max_msg_size=0) as socket:
        text = {"1": {"class_type": "Say", "inputs": {"length": 3_000_000}}}
        await client.queue(graph=text)
        said = next(m for m in await client.listen(socket) if m["type"] == "executed")
        assert len(said["data"]["output"]["text"][0]) == 3_000_000


async def test_a_reader_that_does_not_read_stops_everybodys_messages(client: Client, comfyui: ComfyUIEmulator) -> None:
    """Recorded from a real server: one loop sends everything and waits for each send."""
    async with client.http.ws_connect("/ws?clientId=me") as socket:
        await client.listen(socket, seconds=1)
        reader, writer = await asyncio.open_connection(comfyui.host, comfyui.port)
        writer.write(
            b"GET /ws?clientId=deaf HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        assert isinstance(writer.transport, asyncio.Transport)
        writer.transport.pause_reading()
        comfyui.inject("deaf", bytes(60_000_000))

        prompt_id = await client.queue()
        assert await client.listen(socket, seconds=60) == []
        assert prompt_id in await client.get("/history")

        writer.transport.abort()
        assert types(await client.listen(socket))[-2:] == ["status", "executing"]
