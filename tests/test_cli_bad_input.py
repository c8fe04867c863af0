"""Bad input: two lines (what, and what to do), the right exit code, nothing half-written, nothing left billing."""

from __future__ import annotations

import json
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runcomfy.cli.main import call, comfyctl
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator
from runcomfy.testing.in_thread import InThread, served

GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "in.png"}, "_meta": {"title": "the input"}},
    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "bad-input"}},
}


@pytest.fixture(scope="module")
def comfyui() -> Iterator[InThread[ComfyUIEmulator]]:
    with served(ComfyUIEmulator) as server:
        yield server


@pytest.fixture(scope="module")
def cloud() -> Iterator[InThread[RunComfyEmulator]]:
    with served(lambda: RunComfyEmulator(boot_time=0.2, delete_takes=0.2, rate_limit=False)) as server:
        yield server


@pytest.fixture
def account(cloud: InThread[RunComfyEmulator], monkeypatch: pytest.MonkeyPatch) -> Iterator[RunComfyEmulator]:
    """The environment points at the emulated cloud; at the end it must not bill."""
    for name, value in cloud.emulator.environment().items():
        monkeypatch.setenv(name, value)
    for name, value in (("POLL_INTERVAL", "0.1"), ("REQUESTS_PER_SECOND", "1000"), ("BURST", "1000")):
        monkeypatch.setenv(f"RUNCOMFY_{name}", value)
    monkeypatch.setenv("RUNCOMFY_VISIBILITY_WINDOW", "1")
    yield cloud.emulator
    cloud.call(RunComfyEmulator.behave)
    assert cloud.call(lambda c: c.billing) == []


class Refused:
    """What a refused command printed."""

    def __init__(self, code: int, err: str, out: str) -> None:
        self.code, self.err, self.out = code, err, out
        self.lines = [line for line in err.splitlines() if line.startswith(("error: ", "  -> "))]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run comfyctl; it must fail with two lines and leave nothing behind in the output folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Refused:
        code = call(comfyctl, list(arguments))
        shown = capsys.readouterr()
        what = Refused(code, shown.err, shown.out)
        assert code != 0
        assert len(what.lines) == 2, shown.err
        assert what.lines[0].startswith("error: ")
        assert what.lines[1].startswith("  -> ")
        assert len(what.lines[1]) > len("  -> ") + 5
        assert "Traceback" not in shown.err
        assert files_below(tmp_path / "outputs") == []
        return what

    return run


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.exists() else []


def workflow_file(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "workflow.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


# -- workflow and values -----------------------------------------------------------------------------------


def changed(**inputs: Any) -> dict[str, Any]:
    graph = json.loads(json.dumps(GRAPH))
    for key, value in inputs.items():
        node, _, name = key.partition("__")
        graph[node.removeprefix("n")]["inputs"][name] = value
    return dict(graph)


UI_FORMAT = {"nodes": [{"id": 1, "type": "LoadImage"}], "links": [], "version": 0.4}


@pytest.mark.parametrize(
    ("content", "code", "word"),
    [
        ("{not json", 2, "workflow-not-json"),
        ("", 2, "workflow-not-json"),
        ("[1, 2]", 2, "workflow-invalid"),
        (UI_FORMAT, 2, "workflow-ui-format"),
        ({**GRAPH, "9": {"class_type": "NoSuchNode", "inputs": {}}, "3": {**GRAPH["3"]}}, 2, ""),
        (changed(n2__image=["77", 0]), 2, "workflow-invalid"),
        ({"1": {"inputs": {}}}, 2, "workflow-invalid"),
    ],
    ids=["not json", "empty", "a list", "ui format", "unknown node", "dangling link", "no class"],
)
def test_a_workflow_that_cannot_run_is_refused(
    content: Any, code: int, word: str, comfyui: InThread[ComfyUIEmulator], picture: Path, tmp_path: Path, refused: Any
) -> None:
    if word == "":  # an unknown class counts only where an output needs it
        content = {**GRAPH, "2": {"class_type": "NoSuchNode", "inputs": {"image": ["1", 0]}}}
        word = "preflight-failed"
    path = workflow_file(tmp_path, content)
    what = refused("run", path, "--image", str(picture), "--server", comfyui.emulator.url)
    assert what.code == code
    assert f"[{word}]" in what.err


def test_a_missing_workflow_is_refused(picture: Path, refused: Any) -> None:
    assert refused("run", "no-such.json", "--image", str(picture)).code == 2
    assert "generate_flux_mesh" in refused("run", "generate_flux_mehs").err


def test_a_wrong_value_is_refused_with_node_and_title(
    comfyui: InThread[ComfyUIEmulator], picture: Path, tmp_path: Path, refused: Any
) -> None:
    graph = {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 0, "height": "wide", "batch_size": 1, "color": 0},
            "_meta": {"title": "the canvas"},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    what = refused("run", workflow_file(tmp_path, graph), "--server", comfyui.emulator.url)
    assert what.code == 2
    assert "the canvas" in what.err
    assert "width" in what.err
    assert "height" in what.err  # every problem is named, not only the first
    listed = [line for line in what.err.splitlines() if line.lstrip().startswith("- ")]
    assert len(listed) == 2
    assert all(line.count("the canvas") == 1 for line in listed)


@pytest.mark.parametrize("item", ["nonsense", "=5", "77.image=x", "3.no_such_input=1", "LoadImage=1"])
def test_a_target_that_is_not_there_is_refused(
    item: str, comfyui: InThread[ComfyUIEmulator], picture: Path, refused: Any
) -> None:
    what = refused("run", "image_invert", "--image", str(picture), "--set", item, "--server", comfyui.emulator.url)
    assert what.code == 2


@pytest.mark.parametrize("timeout", ["soon", "-5", "0"])
def test_a_timeout_that_is_none_is_refused(timeout: str, picture: Path, refused: Any) -> None:
    assert refused("run", "image_invert", "--image", str(picture), f"--timeout={timeout}").code == 2


# -- input pictures ----------------------------------------------------------------------------------------


def giant_png(path: Path, side: int) -> None:
    """A PNG whose header promises side x side pixels; a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def write_text(path: Path) -> None:
    path.write_text("I am no picture")


def write_nothing(path: Path) -> None:
    path.write_bytes(b"")


def write_truncated(path: Path) -> None:
    Image.effect_noise((256, 256), 50).save(path)
    path.write_bytes(path.read_bytes()[:-2000])


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (None, "input-file-missing"),
        (write_text, "input-file-invalid"),
        (write_nothing, "input-file-invalid"),
        (lambda path: giant_png(path, 10_000), "input-file-invalid"),
        (write_truncated, "input-file-invalid"),
        (Path.mkdir, "input-file-"),
    ],
    ids=["missing", "text", "0 bytes", "100 megapixels", "truncated", "a folder"],
)
def test_an_input_that_is_no_picture_is_refused_before_anything_is_paid(
    make: Callable[[Path], object] | None, word: str, account: RunComfyEmulator, tmp_path: Path, refused: Any
) -> None:
    path = tmp_path / "in.png"
    if make is not None:
        make(path)
    before = len(account.launched)
    what = refused("run", "image_invert", "--image", str(path))
    assert what.code == 2
    assert word in what.err
    assert len(account.launched) == before


# -- the server --------------------------------------------------------------------------------------------


def test_a_refused_port_is_told(picture: Path, refused: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    what = refused("run", "image_invert", "--image", str(picture), "--server", f"http://127.0.0.1:{port}")
    assert what.code == 4
    assert "[comfyui-unreachable]" in what.err


@pytest.mark.parametrize("url", ["nonsense", "ftp://127.0.0.1:8188", "http://", "127.0.0.1:8188"])
def test_an_address_that_is_none_is_told(url: str, picture: Path, refused: Any) -> None:
    what = refused("run", "image_invert", "--image", str(picture), "--server", url)
    assert what.code == 2


class Splash(BaseHTTPRequestHandler):
    """A web server that is no ComfyUI: it answers everything with a page."""

    def do_GET(self) -> None:
        body = b"<!doctype html><html><body>Welcome</body></html>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - the name http.server looks for

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_server_that_answers_html_is_told(picture: Path, refused: Any) -> None:
    web = ThreadingHTTPServer(("127.0.0.1", 0), Splash)
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    try:
        what = refused(
            "run", "image_invert", "--image", str(picture), "--server", f"http://127.0.0.1:{web.server_port}"
        )
    finally:
        web.shutdown()
        thread.join()
        web.server_close()
    assert what.code == 4
    assert "[comfyui-not-found]" in what.err


# -- settings and credentials ------------------------------------------------------------------------------


def test_no_credentials(picture: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNCOMFY_CREDENTIALS_FILE")
    what = refused("run", "image_invert", "--image", str(picture))
    assert what.code == 3
    assert "[credentials-missing]" in what.err
    assert "RUNCOMFY_API_TOKEN" in what.err
    assert "credentials.txt" in what.err


def test_malformed_credentials(tmp_path: Path, picture: Path, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "credentials.txt"
    path.write_text('userID:"u-1"\nRUNCOMFY_API_TOKEN:"two words are no token"\nversion_id: "v"\n')
    monkeypatch.setenv("RUNCOMFY_CREDENTIALS_FILE", str(path))
    what = refused("run", "image_invert", "--image", str(picture))
    assert what.code == 3
    assert "[credentials-malformed]" in what.err
    assert "two words" not in what.err


@pytest.mark.parametrize(
    ("name", "value", "code", "word"),
    [
        ("RUNCOMFY_API_BASE_URL", "http://example.com", 3, "insecure-url"),
        ("RUNCOMFY_POLL_INTERVAL", "often", 3, "setting-invalid"),
        ("RUNCOMFY_API_TOKEN", "not-the-token", 4, "provider-auth-rejected"),
        ("RUNCOMFY_USER_ID", "somebody-else", 4, "provider-access-denied"),
        ("RUNCOMFY_DEFAULT_SERVER_TYPE", "gigantic", 2, "value-invalid"),
        ("RUNCOMFY_MAX_USD_PER_HOUR", "0.10", 8, "budget-exceeded"),
    ],
)
def test_wrong_settings_are_told_and_nothing_is_launched(
    name: str,
    value: str,
    code: int,
    word: str,
    account: RunComfyEmulator,
    picture: Path,
    refused: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, value)
    before = len(account.launched)
    what = refused("run", "image_invert", "--image", str(picture))
    assert (what.code, f"[{word}]" in what.err) == (code, True), what.err
    assert len(account.launched) == before


def test_a_wrong_path_of_the_api_is_not_taken_for_a_wrong_token(
    account: RunComfyEmulator, picture: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNCOMFY_API_BASE_URL", f"{account.url}/wrong")
    what = refused("run", "image_invert", "--image", str(picture))
    assert what.code == 4
    assert "[provider-wrong-url]" in what.err
    assert refused("doctor").code == 4


def test_json_prints_one_object_also_when_refused(
    picture: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments in (["image_invert", "--image", str(picture)], ["nope"], ["image_invert", "--set", "rubbish"]):
        code = call(comfyctl, ["run", *arguments, "--json"])
        job = json.loads(capsys.readouterr().out)
        assert code in (2, 3)
        assert job["status"] == "failed"
        assert set(job["error"]) == {"code", "message", "hint", "details"}
        assert job["cost_usd"] == "0"
