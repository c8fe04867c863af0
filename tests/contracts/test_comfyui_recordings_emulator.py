"""The emulated ComfyUI against recordings of the real one: same statuses, fields, types, values and order.

What is compared and what is left out, with the reason, stands in `tests/recordings/coverage.toml`.
"""

from __future__ import annotations

import copy
import io
import json
import re
import tomllib
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runcomfy.testing.clock import LoopClock
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.recordings import Comparison, Event, Recording, Results
from runcomfy.testing.replay import Hook, Replay

FOLDER = Path(__file__).parents[1] / "recordings"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jsonl"))
COVERAGE: dict[str, Any] = tomllib.loads((FOLDER / "coverage.toml").read_text(encoding="utf-8"))
RECORDED_HOST = "127.0.0.1:8188"


def padded_png(length: int, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture of exactly that many bytes: what follows the end of a PNG is nobody's business."""
    data = io.BytesIO()
    colour = (200, 30, 30, 128)[: len(mode)]
    Image.new(mode, size, colour).save(data, format="PNG")
    png = data.getvalue()
    if len(png) > length:
        return padded_png(length, "L", (4, 4)) if size != (4, 4) else png[:length]
    return png + bytes(length - len(png))


def make_file(name: str, length: int) -> bytes:
    """The bytes of an uploaded file; those that a later answer shows are as recorded."""
    known = {
        ("page.html", 9): b"<b>hi</b>",
        ("pic.svg", 41): b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        ("data.bin", 10240): bytes(range(256)) * 40,
        ("cube.glb", 12): b"glTF\x02\x00\x00\x00\x0c\x00\x00\x00",
        ("notes.txt", 5): b"hello",
        ("clip.mp4", 12): b"\x00\x00\x00\x18ftypmp42",
        ("snd.flac", 4): b"fLaC",
        ("a.json", 2): b"{}",
        ("noext", 1): b"x",
        ('qu"ote.txt', 1): b"q",
    }
    if (name, length) in known:
        return known[name, length]
    if name.endswith(".png") and length:
        return padded_png(length, "RGBA" if length >= 118 and length != 141 else "RGB")
    return bytes(length)


def give(name: str, length: int = 141) -> Callable[[ComfyUIEmulator], None]:
    """A file that was in the input folder before the recording began."""

    def put(emulator: ComfyUIEmulator) -> None:
        emulator.folders.input.mkdir(parents=True, exist_ok=True)
        (emulator.folders.input / name).write_bytes(make_file(name, length))

    return put


@dataclass(frozen=True)
class Scenario:
    """What a recording needs beside its own events."""

    options: Mapping[str, Any] = field(default_factory=dict)
    before: Callable[[ComfyUIEmulator], object] = lambda _: None
    hooks: Callable[[ComfyUIEmulator], Mapping[int, Hook]] = lambda _: {}
    strict_status: bool = False
    base: str = "/srv/comfyui-base"
    """The recorded server's base folder."""
    skipped: Container[int] = ()
    warm_up: Mapping[str, Any] | None = None
    """A graph that ran on the recorded server just before, so that its nodes are cached."""


def acts(**by_line: Callable[[ComfyUIEmulator], Awaitable[object] | None]) -> Callable[..., Mapping[int, Hook]]:
    """Hooks that do something to the emulator, by line: `line_12=...`."""

    def bind(emulator: ComfyUIEmulator) -> Mapping[int, Hook]:
        def hook(act: Callable[[ComfyUIEmulator], Awaitable[object] | None]) -> Hook:
            async def run(_: Replay) -> None:
                result = act(emulator)
                if result is not None:
                    await result

            return run

        return {int(line.removeprefix("line_")): hook(act) for line, act in by_line.items()}

    return bind


def delete(folder: str, pattern: str) -> Callable[[ComfyUIEmulator], None]:
    def run(emulator: ComfyUIEmulator) -> None:
        for path in getattr(emulator.folders, folder).glob(pattern):
            path.unlink()

    return run


def with_options(emulator: ComfyUIEmulator) -> Mapping[int, Hook]:
    """One server after the other, each started with other options, as the recorder did."""
    servers: list[ComfyUIEmulator] = []

    def start(**options: Any) -> Hook:
        async def run(replay: Replay) -> None:
            folder = emulator.folders.output.parent.parent / f"server{len(servers)}"
            servers.append(ComfyUIEmulator(folder=folder, **options))
            replay.url = await servers[-1].start()
            replay.results.substitutions[replay.url.removeprefix("http://")] = RECORDED_HOST

        return run

    async def end(_: Replay) -> None:
        await servers[-1].stop()

    return {
        2: start(max_upload_size_mb=1.0, cors="https://studio.example", compress=True),
        26: end,
        27: start(multi_user=True),
        54: end,
        62: start(cache=False, save_metadata=False),
        99: end,
        100: start(enable_assets=True),
        128: end,
    }


kill = ComfyUIEmulator.kill
restart = ComfyUIEmulator.restart

SCENARIOS: dict[str, Scenario] = {
    "01-success-simple-image": Scenario(strict_status=True),
    "02-cached-rerun": Scenario(
        before=give("probe_in.png"),
        hooks=acts(line_40=delete("output", "probe/cached_0*")),
        warm_up={
            "1": {"class_type": "LoadImage", "inputs": {"image": "probe_in.png"}},
            "2": {
                "class_type": "ImageScale",
                "inputs": {
                    "image": ["1", 0],
                    "upscale_method": "bilinear",
                    "width": 96,
                    "height": 72,
                    "crop": "disabled",
                },
            },
            "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
        },
    ),
    "05-progress-and-previews": Scenario(strict_status=True),
    "11-server-killed": Scenario(
        hooks=acts(
            line_39=kill,
            line_43=restart,
            line_96=kill,
            line_97=restart,
            line_111=kill,
            line_112=restart,
            line_126=ComfyUIEmulator.hang,
            line_128=ComfyUIEmulator.resume,
        )
    ),
    "14-server-options": Scenario(hooks=with_options, skipped=range(54, 62)),
    "15-requests-that-break-a-server": Scenario(hooks=acts(line_69=kill, line_70=restart)),
    "16-older-server-0.3.64": Scenario(options={"version": "0.3.64"}),
    "17-older-server-0.10.0": Scenario(options={"version": "0.10.0"}),
    "18-files-and-slow-readers": Scenario(
        hooks=acts(line_106=delete("input", "moving.png")), base="/srv/comfyui-base-crash"
    ),
}

_played: dict[str, Results] = {}
"""Results by recording: each is played once, and looked at by several tests."""


@cache
def recording_of(name: str) -> Recording:
    return Recording.load(FOLDER / f"{name}.jsonl").first(COVERAGE[name].get("replayed_lines"))


async def run_graph(emulator: ComfyUIEmulator, graph: Mapping[str, Any]) -> None:
    async with aiohttp.ClientSession(emulator.url) as http, http.ws_connect("/ws?clientId=before") as socket:
        await http.post("/prompt", json={"prompt": graph, "client_id": "before"})
        async for message in socket:
            if '"node": null' in message.data:
                return


async def results_of(name: str, tmp_path: Path) -> Results:
    if name not in _played:
        scenario = SCENARIOS.get(name, Scenario())
        # Stamps of the story's time: by the wall, how long a prompt took would be chance.
        clock = LoopClock()
        emulator = ComfyUIEmulator(folder=tmp_path / "comfyui", now=lambda: clock.now().timestamp(), **scenario.options)
        scenario.before(emulator)
        async with emulator:
            if scenario.warm_up is not None:
                await run_graph(emulator, scenario.warm_up)
            replay = Replay(
                recording_of(name),
                emulator.url,
                make_file=make_file,
                hooks=scenario.hooks(emulator),
                skipped=scenario.skipped,
                substitutions={
                    f"{emulator.host}:{emulator.port}": RECORDED_HOST,
                    str(emulator.folders.output.parent): scenario.base,
                },
            )
            _played[name] = await replay.run()
    return _played[name]


def left_out(name: str) -> list[str]:
    return [path for entry in COVERAGE[name].get("left_out", []) for path in entry["paths"]]


def differences(recording: Recording, results: Results) -> list[str]:
    scenario = SCENARIOS.get(recording.name, Scenario())
    tails = COVERAGE[recording.name].get("open_ends", {}).get("sockets", [])
    comparison = Comparison(recording, results, ignored=left_out(recording.name), tails=tails)
    return comparison.run(strict_status=scenario.strict_status)


@pytest.mark.parametrize("name", NAMES)
async def test_the_emulator_answers_as_recorded(name: str, tmp_path: Path) -> None:
    found = differences(recording_of(name), await results_of(name, tmp_path))
    assert not found, "\n".join(found)


# The list of what is covered is itself checked.


@pytest.mark.parametrize("name", NAMES)
def test_the_list_of_coverage_is_exact(name: str) -> None:
    """Every recording is listed; what is left out exists in it, and says why."""
    recording = Recording.load(FOLDER / f"{name}.jsonl")
    known = {str(number) for number in recording.answers()} | set(recording.sockets())
    for entry in COVERAGE[name].get("left_out", []):
        assert len(entry["reason"]) > 20
        for path in entry["paths"]:
            assert re.split(r"[.\[]", path)[0] in known, path
    lines = COVERAGE[name].get("replayed_lines")
    assert lines is None or 0 < lines < len(recording.events)
    assert (lines is None) == ("rest" not in COVERAGE[name])


def test_nothing_is_listed_that_is_not_there() -> None:
    assert sorted(COVERAGE) == NAMES


def test_most_of_the_recorded_traffic_is_compared() -> None:
    """Whole exchanges that are left out stay few."""
    total = left = 0
    for name in NAMES:
        answers = {str(number) for number in Recording.load(FOLDER / f"{name}.jsonl").answers()}
        total += len(answers)
        replayed = {str(number) for number in recording_of(name).answers()}
        left += len(answers - replayed) + len(replayed & set(left_out(name)))
    assert left / total < 0.05


# A changed recording is noticed: the comparison above is not one that passes whatever it sees.

SENSITIVE = ("01-success-simple-image", "03-node-raises", "04-validation-failures", "10-history-queue-info")
ONCE = ("executing", "executed", "execution_start", "execution_cached", "execution_success", "execution_error")


def fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to every field of every object in a JSON value, below tracebacks excepted."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            if key != "traceback":
                yield from fields(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from fields(inner, (*path, index))


def targets(name: str) -> list[tuple[int, tuple[Any, ...]]]:
    """(event, path) of every field that the comparison promises to look at."""
    ignored = left_out(name)
    found = []
    for index, event in enumerate(recording_of(name).events):
        if event["dir"] == "http-res" and "json" in event:
            where = f"{event['n']}.json"
        elif event["dir"] == "ws-text" and event["json"]["type"] in ONCE:
            where = f"{event['sock']}.messages"
        else:
            continue
        for path in fields(event["json"]):
            full = ".".join((where, *(str(part) for part in path)))
            if not any(full == one or full.startswith(f"{one}.") or where.startswith(one) for one in ignored):
                found.append((index, path))
    return found


TARGETS = [(name, *target) for name in SENSITIVE for target in targets(name)]


def changed(recording: Recording, index: int, path: tuple[Any, ...], how: str) -> Recording:
    events: list[Event] = list(recording.events)
    events[index] = copy.deepcopy(events[index])
    holder: Any = events[index]["json"]
    for part in path[:-1]:
        holder = holder[part]
    value = holder[path[-1]]
    if how == "absent":
        del holder[path[-1]]
    elif how == "renamed":
        holder[f"{path[-1]}_"] = holder.pop(path[-1])
    elif how == "other type":
        holder[path[-1]] = {"was": value} if not isinstance(value, dict) else [value]
    elif how == "more":
        holder["surprise"] = 1
    return Recording(recording.name, tuple(events))


async def test_a_changed_field_is_noticed(tmp_path: Path) -> None:
    results = {name: await results_of(name, tmp_path) for name in SENSITIVE}

    @settings(max_examples=150)
    @given(target=st.sampled_from(TARGETS), how=st.sampled_from(["absent", "renamed", "other type", "more"]))
    def noticed(target: tuple[str, int, tuple[Any, ...]], how: str) -> None:
        name, index, path = target
        assert differences(changed(recording_of(name), index, path, how), results[name])

    noticed()


@pytest.mark.parametrize(
    ("name", "find", "replace"),
    [
        ("01-success-simple-image", '"status_str": "success"', '"status_str": "error"'),
        ("01-success-simple-image", '"queue_remaining": 1', '"queue_remaining": 2'),
        ("01-success-simple-image", '"state": "finished"', '"state": "done"'),
        ("01-success-simple-image", '"Content-Type": "image/png"', '"Content-Type": "image/gif"'),
        ("03-node-raises", '"exception_type": "ValueError"', '"exception_type": "KeyError"'),
        ("04-validation-failures", "smaller than min", "below the minimum"),
        ("04-validation-failures", '"status": 400', '"status": 422'),
        ("10-history-queue-info", '"has_more": false', '"has_more": true'),
    ],
)
async def test_a_changed_value_is_noticed(name: str, find: str, replace: str, tmp_path: Path) -> None:
    text = "\n".join(json.dumps(event) for event in recording_of(name).events)
    assert find in text
    events = tuple(json.loads(line) for line in text.replace(find, replace).splitlines())
    assert differences(Recording(name, events), await results_of(name, tmp_path))


@pytest.mark.parametrize("event_type", ["execution_start", "executed", "execution_success"])
async def test_a_missing_or_misplaced_message_is_noticed(event_type: str, tmp_path: Path) -> None:
    name = "01-success-simple-image"
    results = await results_of(name, tmp_path)
    events = list(recording_of(name).events)
    at = next(i for i, e in enumerate(events) if e["dir"] == "ws-text" and e["json"]["type"] == event_type)
    without = (*events[:at], *events[at + 1 :])
    assert differences(Recording(name, without), results)
    swapped = (*events[: at - 1], events[at], events[at - 1], *events[at + 1 :])
    assert differences(Recording(name, swapped), results)
