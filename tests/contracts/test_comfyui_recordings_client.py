"""Our client against what real servers answered: every recorded outcome ends as it should, on all recorded versions."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient
from runcomfy.adapters.comfyui.wire import read_frame
from runcomfy.application.watcher import Watcher
from runcomfy.domain.exceptions import OutputMissing, PromptRejected, RunComfyError, ServerUnreachable
from runcomfy.domain.job import FileRef, PromptId
from runcomfy.domain.progress import NodeLabel, NodeText, Preview, Progress, Said
from runcomfy.domain.settings import ComfySettings
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.recorded_server import RecordedServer
from runcomfy.testing.recordings import Event, Recording

RECORDINGS = Path(__file__).parents[1] / "recordings"
SETTINGS = ComfySettings()


def load(name: str) -> Recording:
    return Recording.load(next(RECORDINGS.glob(f"{name}-*.jsonl")))


def client_of(server: RecordedServer) -> ComfyUIWorkflowClient:
    return ComfyUIWorkflowClient(server.url, SETTINGS, clock=LoopClock())


@dataclass
class Outcome:
    """How a recorded prompt ended for us."""

    ended: str
    files: dict[str, list[str]] = field(default_factory=dict)
    cached: frozenset[str] = frozenset()
    node: str = ""
    exception: str = ""
    progress: list[Progress] = field(default_factory=list, compare=False)


async def play(server: RecordedServer) -> Outcome:
    """Submit the recorded prompt and watch it to its end."""
    progress: list[Progress] = []
    labels = {
        node: NodeLabel(entry.get("_meta", {}).get("title", ""), entry["class_type"])
        for node, entry in server.graph.items()
    }
    prompt_id = PromptId(server.prompt_id)
    async with server, client_of(server) as client:
        try:
            async with client.listen(prompt_id) as events:
                submitted = await client.submit(server.graph, prompt_id=prompt_id)
                watcher = Watcher(client, SETTINGS, clock=LoopClock())
                ended = await watcher.watch(submitted.prompt_id, labels, events=events, on_progress=progress.append)
        except RunComfyError as error:
            node, exception = str(error.details.get("node_id", "")), str(error.details.get("exception_type", ""))
            return Outcome(error.code, node=node, exception=exception, progress=progress)
        finally:
            assert client.dropped == 0, "a real server's frame was not understood"
    return Outcome("done", files_of(ended.outputs), ended.cached, progress=progress)


def files_of(outputs: Any) -> dict[str, list[str]]:
    return {
        node: [
            item["filename"] if isinstance(item, dict) else str(item)
            for values in ui.values()
            if isinstance(values, list)
            for item in values
            if isinstance(item, dict | str)
        ]
        for node, ui in outputs.items()
    }


@dataclass(frozen=True)
class Story:
    """One recorded prompt."""

    recording: str
    prompt: int
    ended: Outcome
    sockets: tuple[str, ...] = ("A",)
    queues: tuple[int, ...] = ()

    def server(self, recording: Recording | None = None) -> RecordedServer:
        return RecordedServer(
            recording or load(self.recording),
            self.prompt,
            sockets=self.sockets,
            queues=self.queues,
            also=[load("10"), load("06")],
        )


def done(files: dict[str, list[str]], *cached: str) -> Outcome:
    return Outcome("done", files, frozenset(cached))


def failed(node: str, exception: str) -> Outcome:
    return Outcome("node-failed", node=node, exception=exception)


def interrupted(node: str) -> Outcome:
    return Outcome("prompt-interrupted", node=node)


ALL_FIVE = ("1", "2", "3", "4", "5")
RESTARTED = Outcome("server-restarted")

STORIES = {
    # 0.33.0
    "a picture is made": Story("01", 2, done({"5": ["simple_00004_.png"]})),
    "everything is cached": Story("02", 2, done({"5": ["cached_00002_.png"]}, *ALL_FIVE)),
    "everything is cached and the file is gone": Story("02", 4, done({"5": ["cached_00002_.png"]}, *ALL_FIVE)),
    "all but the last node is cached": Story("02", 7, done({"5": ["cached_b_00002_.png"]}, "1", "2", "3", "4")),
    "a node raises": Story("03", 1, failed("2", "ValueError")),
    "a node raises after another delivered": Story("03", 4, failed("2", "RuntimeError")),
    "a branch is blocked with a message": Story("03", 7, done({"4": ["gate_00002_.png"]})),
    "a branch is blocked without a word": Story("03", 9, done({"4": ["gate_00002_.png"]}, "1", "4")),
    "a node raises and nobody is told": Story("03", 11, failed("2", "ValueError")),
    "memory runs out, history not recorded": Story("03", 13, failed("2", "MemoryError")),
    "previews of the old kind": Story("05", 1, done({"20": ["ComfyUI_temp_inhdf_00001_.png"]})),
    "previews with metadata": Story("05", 2, done({"20": ["ComfyUI_temp_inhdf_00002_.png"]}), ("B",)),
    "two nodes at once": Story(
        "05", 3, done({"3": ["ComfyUI_temp_kfbue_00001_.png"], "4": ["ComfyUI_temp_tblqe_00001_.png"]}), ("B",)
    ),
    "a node expands": Story("05", 4, done({"3": ["ComfyUI_temp_kfbue_00002_.png"]}), ("B",)),
    "a node sends text": Story("05", 6, done({"1": ["grüße aus der probe"]}), ("B",)),
    "a node is silent": Story("05", 7, done({"3": ["ComfyUI_temp_ldbkr_00001_.png"]}), ("B",)),
    "interrupted by id": Story("06", 1, interrupted("10")),
    "interrupted without id": Story("06", 5, interrupted("10")),
    "another one is interrupted": Story("06", 7, done({"20": ["ComfyUI_temp_tvhxi_00001_.png"]})),
    "interrupted when the node looks": Story("06", 14, interrupted("3")),
    "an interrupt is lost": Story("06", 16, done({"1": ["late 4768181d-b462-4db3-adc7-cb6f67b27a46"]})),
    "removed while it waits": Story("06", 22, Outcome("prompt-removed"), queues=(25, 32)),
    "the socket is cut and comes back": Story("07", 3, done({"20": ["ComfyUI_temp_gunpz_00003_.png"]}), ("A", "A2")),
    "the socket is back too late": Story("07", 4, done({"20": ["ComfyUI_temp_gunpz_00004_.png"]}), ("A2", "A3")),
    "the socket falls silent": Story("07", 6, done({"20": ["ComfyUI_temp_gunpz_00005_.png"]}), ("A3",)),
    "killed while it ran": Story("11", 3, RESTARTED, ("A", "A2")),
    "killed while it waited": Story("11", 4, RESTARTED, ("A", "A2")),
    "stopped by SIGINT": Story("11", 17, RESTARTED, ("A2", "A3")),
    "stopped by SIGTERM": Story("11", 18, RESTARTED, ("A3", "A4")),
    "the server stands still for 4 s": Story("11", 19, done({"20": ["ComfyUI_temp_angbc_00001_.png"]}), ("A4",)),
    "a batch of six": Story("13", 1, done({"9": [f"k_img_{n:05}_.png" for n in range(7, 13)]})),
    "a video": Story("13", 21, done({"9": ["k_video_00003_.mp4"]}, "1")),
    "a mesh named by a path": Story(
        "13", 53, done({"9": ["preview3d_9ba7093419fb4581905c8a734df66608.glb"]}, "1", "2", "3")
    ),
    "success without outputs": Story("13", 94, done({})),
    "a prefix that leaves the folder": Story("13", 104, failed("9", "Exception")),
    "outputs with asset ids": Story("14", 28, done({"2": ["asset_00001_.png"]}), ("A2",)),
    "the worker is dead": Story("15", 6, Outcome("worker-dead"), (), (7,)),
    "an input disappears while it waits": Story("18", 12, failed("1", "av.error.FileNotFoundError")),
    # 0.3.64
    "0.3.64 makes a picture": Story("16", 4, done({"5": ["simple_00001_.png"]})),
    "0.3.64 has it cached": Story("16", 7, done({"5": ["simple_00001_.png"]}, *ALL_FIVE)),
    "0.3.64 sends previews": Story("16", 8, done({"20": ["ComfyUI_temp_upcps_00001_.png"]})),
    "0.3.64 fails": Story("16", 9, failed("1", "ValueError")),
    "0.3.64 is interrupted": Story("16", 11, interrupted("10")),
    # 0.10.0
    "0.10.0 makes a picture": Story("17", 4, done({"5": ["simple_00001_.png"]})),
    "0.10.0 has it cached": Story("17", 7, done({"5": ["simple_00001_.png"]}, *ALL_FIVE)),
    "0.10.0 sends previews": Story("17", 8, done({"20": ["ComfyUI_temp_npudd_00001_.png"]})),
    "0.10.0 fails": Story("17", 9, failed("1", "ValueError")),
    "0.10.0 is interrupted": Story("17", 11, interrupted("10")),
}


@pytest.mark.parametrize("name", STORIES)
async def test_a_recorded_prompt_ends_as_it_should(name: str) -> None:
    story = STORIES[name]
    outcome = await play(story.server())
    assert outcome == story.ended
    percents = [progress.percent for progress in outcome.progress]
    assert percents == sorted(percents)
    assert (percents[-1] == 100) is (story.ended.ended == "done")


async def test_a_person_sees_nodes_steps_and_pictures() -> None:
    for prompt, sockets in ((1, ("A",)), (2, ("B",))):
        outcome = await play(RecordedServer(load("05"), prompt, sockets=sockets))
        steps = [p.message for p in outcome.progress if p.value is not None]
        assert steps[0].startswith("ProbeSteps 1/")
        assert any(p.preview for p in outcome.progress), "both kinds of preview frames carry a picture"
        assert {p.node_id for p in outcome.progress if p.preview} == {"10"}


async def test_expanded_nodes_count_for_the_node_they_came_from() -> None:
    outcome = await play(RecordedServer(load("05"), 4, sockets=("B",)))
    assert {p.node_id for p in outcome.progress} == {None, "1", "3"}
    inside = [p.percent for p in outcome.progress if p.node_id == "1" and p.percent < 50]
    assert len(set(inside)) > 3, "the parts of an expanded node move the percent"


# --- refusals ---------------------------------------------------------------------------------------------

REFUSALS = [
    (1, "1", "missing_node_type", ""),
    (2, "1", "missing_node_type", ""),
    (3, "1", "missing_node_type", ""),
    (4, "1", "exception_during_inner_validation", "images"),
    (5, "2", "exception_during_validation", ""),
    (6, "1", "required_input_missing", "color"),
    (7, "2", "exception_during_validation", ""),
    (8, "2", "exception_during_validation", ""),
    (9, "2", "bad_linked_input", "images"),
    (10, "2", "return_type_mismatch", "images"),
    (12, "1", "value_bigger_than_max", "width"),
    (13, "1", "value_smaller_than_min", "width"),
    (14, "1", "invalid_input_type", "width"),
    (16, "2", "value_not_in_list", "upscale_method"),
    (17, "1", "custom_validation_failed", "image"),
    (18, "2", "dependency_cycle", ""),
    (19, "", "prompt_no_outputs", ""),
    (20, "", "prompt_no_outputs", ""),
    (21, "3", "value_smaller_than_min", "width"),
]


@pytest.mark.fault(36)
@pytest.mark.parametrize(("number", "node", "kind", "input_name"), REFUSALS)
async def test_a_refusal_names_node_input_and_what_to_do(number: int, node: str, kind: str, input_name: str) -> None:
    recording = load("04")
    server = RecordedServer(recording, number, sockets=("A",), also=[load("10"), load("06")])
    prompt_id = PromptId(server.prompt_id or str(uuid.uuid4()))
    async with server, client_of(server) as client:
        with pytest.raises(PromptRejected) as caught:
            await client.submit(server.graph, prompt_id=prompt_id)
    first = caught.value.details["errors"][0]
    assert (first["node_id"], first["type"], first["input"]) == (node, kind, input_name)
    assert first["hint"]
    assert caught.value.hint
    if node:
        assert f"#{node}" in caught.value.message
    posts = [path for method, path, _ in server.requests if (method, path) == ("POST", "/prompt")]
    assert len(posts) == 1, "a refusal is an answer: nothing is sent again"


async def test_what_was_accepted_in_part_is_taken_back() -> None:
    server = RecordedServer(load("04"), 21, sockets=("A",), also=[load("10"), load("06")])
    async with server, client_of(server) as client:
        with pytest.raises(PromptRejected):
            await client.submit(server.graph, prompt_id=PromptId(server.prompt_id))
    assert any(server.prompt_id in path + body.decode() for _, path, body in server.requests[1:])


@pytest.mark.parametrize("number", [26, 34])
async def test_a_500_is_looked_into_before_it_is_believed(number: int) -> None:
    server = RecordedServer(load("04"), number, sockets=("A",))
    async with server, client_of(server) as client:
        with pytest.raises(PromptRejected) as caught:
            await client.submit(server.graph, prompt_id=PromptId(str(uuid.uuid4())))
    assert caught.value.details["status"] == 500
    paths = [path.partition("?")[0] for _, path, _ in server.requests]
    first, second = [at for at, path in enumerate(paths) if path == "/prompt"][:2]
    assert paths[first + 1 : second].count("/queue") == 2


async def test_old_servers_are_told_from_new_ones() -> None:
    expected = {"16": ("0.3.64", True, False), "17": ("0.10.0", True, False), "10": ("0.33.0", True, True)}
    for name, facts in expected.items():
        server = RecordedServer(load(name), also=[load("10"), load("06")])
        async with server, client_of(server) as client:
            info = await client.probe()
            assert (info.version, info.interrupts_by_id, info.cancels_jobs) == facts
            assert info.max_upload_bytes == 104857600


async def test_jobs_are_cancelled_as_recorded() -> None:
    for job, told in (("ab003c15-e6f4-4d88-a249-5104710cd549", True), ("76965db9-7acd-4326-9e3a-6acb10f589ce", False)):
        server = RecordedServer(load("06"), also=[load("10"), load("06")])
        async with server, client_of(server) as client:
            assert await client.cancel(PromptId(job), alone=False) is told


# --- files ------------------------------------------------------------------------------------------------


async def test_a_recorded_file_is_downloaded_whole(tmp_path: Path) -> None:
    recording = load("01")
    body = next(told for asked, told in recording.answers().values() if asked["path"].startswith("/view"))
    server = RecordedServer(recording)
    async with server, client_of(server) as client:
        fetched = await client.fetch(FileRef("simple_00004_.png", "probe"), str(tmp_path / "x.png"))
    assert fetched.size_bytes == body["length"] == (tmp_path / "x.png").stat().st_size
    assert fetched.sha256 == hashlib.sha256((tmp_path / "x.png").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("02", FileRef("cached_00002_.png", "probe")),
        ("11", FileRef("ComfyUI_temp_jpmat_00001_.png", type="temp")),
        ("13", FileRef("2026-64x64_00007_.png", "probe/%date:yyyy-MM-dd%")),
    ],
)
async def test_a_file_that_is_not_there_is_missing(name: str, file: FileRef, tmp_path: Path) -> None:
    recording = load(name)
    recorded = [
        a for asked, a in recording.answers().values() if asked["path"].startswith("/view?filename=" + file.filename)
    ]
    server = RecordedServer(recording)
    async with server, client_of(server) as client:
        if recorded[0]["status"] == 404:
            with pytest.raises(OutputMissing):
                await client.fetch(file, str(tmp_path / "x"))
            assert not (tmp_path / "x").exists()
        else:
            assert (await client.fetch(file, str(tmp_path / "x"))).size_bytes == recorded[0]["length"]


async def test_an_upload_counts_once_every_byte_is_there(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    server = RecordedServer(load("08"), also=[_for_the_upload(load("09"))])
    async with server, client_of(server) as client:
        path.write_bytes(bytes(10240))
        name = await client.upload(str(path))
        assert name == "up_28493445.png", "the name that counts is the one the server gave"
        path.write_bytes(bytes(10241))
        with pytest.raises(ServerUnreachable, match="10240 of 10241 bytes"):
            await client.upload(str(path))


def _for_the_upload(recording: Recording) -> Recording:
    """The recorded HEAD answer (10240 bytes), given for the name that the upload was recorded under."""
    events = copy.deepcopy(list(recording.events))
    for event in events:
        if event["dir"] == "http-req" and event["method"] == "HEAD":
            event["path"] = "/view?filename=up_28493445.png&subfolder=&type=input"
    return Recording(recording.name, tuple(events))


# --- frames -----------------------------------------------------------------------------------------------


def test_every_recorded_frame_is_understood() -> None:
    seen: dict[type, int] = {}
    for path in sorted(RECORDINGS.glob("*.jsonl")):
        for event in Recording.load(path).events:
            if event["dir"] == "ws-text":
                if "omitted_characters" in event["json"]["data"]:
                    continue  # only its length was kept
                frame = read_frame(json.dumps(event["json"]).encode())
            elif event["dir"] == "ws-binary":
                frame = read_frame(base64.b64decode(event["base64"]))
            else:
                continue
            assert frame is not None, (path.name, event["t"])
            seen[type(frame.event)] = seen.get(type(frame.event), 0) + 1
    assert set(seen) == {Said, Preview, NodeText}
    assert seen[Said] > 1000


# --- a recording that says something else ends differently -------------------------------------------------

Change = Callable[[Event], bool]


def message(kind: str, prompt_id: str, **changes: Any) -> Change:
    """Change fields of a prompt's messages of one kind."""

    def change(event: Event) -> bool:
        if event["dir"] != "ws-text":
            return False
        said = event["json"]
        if said["type"] != kind or said["data"].get("prompt_id") != prompt_id:
            return False
        said["data"].update(changes)
        return True

    return change


def entry(prompt_id: str, alter: Callable[[dict[str, Any]], None]) -> Change:
    """Change the history entry of a prompt."""

    def change(event: Event) -> bool:
        said = event.get("json")
        if event["dir"] != "http-res" or not isinstance(said, dict) or prompt_id not in said:
            return False
        if not isinstance(said[prompt_id], dict):
            return False
        alter(said[prompt_id])
        return True

    return change


def answer(number: int, **changes: Any) -> Change:
    def change(event: Event) -> bool:
        if event["dir"] != "http-res" or event["n"] != number:
            return False
        event.update(changes)
        return True

    return change


def rename_output(found: dict[str, Any]) -> None:
    found["outputs"]["5"]["images"][0]["filename"] = "other.png"


def rename_exception(found: dict[str, Any]) -> None:
    for kind, data in found["status"]["messages"]:
        if kind == "execution_error":
            data["exception_type"] = "KeyError"


def not_an_interrupt(found: dict[str, Any]) -> None:
    for said in found["status"]["messages"]:
        if said[0] == "execution_interrupted":
            said[0] = "execution_error"


def forget_cached(found: dict[str, Any]) -> None:
    for kind, data in found["status"]["messages"]:
        if kind == "execution_cached":
            data["nodes"] = []


PICTURE = "26e5f379-2332-4ea9-ba30-a74b7d79f221"
RAISED = "9a2f796c-18b0-462e-96bf-732cbf2dddee"
BLOCKED = "492320d4-13df-42bb-8e71-5212931ea0d1"
STOPPED = "18c04bb1-b6d7-49b8-aeda-8d3a578e23c4"
CACHED = "6bd70ef9-a540-494e-a68d-2a3c0b9c9ddb"

MUTATIONS: list[tuple[str, list[Change]]] = [
    ("a picture is made", [entry(PICTURE, rename_output)]),
    ("a picture is made", [entry(PICTURE, lambda e: e["status"].update(status_str="error"))]),
    ("a picture is made", [entry(PICTURE, lambda e: e.update(outputs={}))]),
    ("a node raises", [entry(RAISED, rename_exception)]),
    ("a node raises", [entry(RAISED, lambda e: e["status"].update(status_str="success"))]),
    ("a branch is blocked with a message", [entry(BLOCKED, lambda e: e["status"].update(status_str="error"))]),
    ("interrupted by id", [entry(STOPPED, not_an_interrupt)]),
    (
        "everything is cached",
        [entry(CACHED, forget_cached), message("execution_cached", CACHED, nodes=[])],
    ),
    ("the worker is dead", [answer(7, json={"queue_running": [], "queue_pending": []})]),
    (
        "removed while it waits",
        [
            answer(27, json={"da15c389-4311-4454-a406-115b0d4c9cd0": {"outputs": {}}}),
            lambda e: e["dir"] == "http-req" and e["n"] == 27,
        ],
    ),
]


@pytest.mark.parametrize("at", range(len(MUTATIONS)))
async def test_a_changed_recording_ends_differently(at: int) -> None:
    name, changes = MUTATIONS[at]
    story = STORIES[name]
    events = copy.deepcopy(list(load(story.recording).events))
    for change in changes:
        assert [event for event in events if change(event)], "the change found nothing to change"
    outcome = await play(story.server(Recording(story.recording, tuple(events))))
    assert outcome != story.ended
