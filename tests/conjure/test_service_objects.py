"""What callers do with service objects: pass paths, fork, set the account up late, ask from many threads at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launcher.conjure.engine import close_engines, shared_engine
from launcher.conjure.probe import answers
from launcher.conjure.snapshots import snapshot
from launcher.generation_services import get_generation_service
from runcomfy.domain.exceptions import RunComfyError

FORKS = """
import multiprocessing, sys
from launcher.generation_services import get_generation_service

mode = sys.argv[1]
old = get_generation_service(mode)

def ask(service):
    try:
        service.generate_flux_depth_image("missing.png", "a fox")
    except FileNotFoundError:
        return True

def with_it():
    sys.exit(0 if ask(old) else 3)

def with_another():
    sys.exit(0 if ask(get_generation_service(mode)) else 3)

def with_none():
    pass

assert ask(old)
for work in (with_it, with_another, with_none):
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(30)
    if child.exitcode is None:
        child.kill()
    print(work.__name__, child.exitcode)
assert ask(old)
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("RUNCOMFY_STATE_DIR", str(tmp_path / "state"))
    yield
    close_engines()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("mode", ["local", "serverless"])
def test_a_child_that_was_forked_has_an_engine_of_its_own_and_ends(mode: str, tmp_path: Path) -> None:
    script = tmp_path / "forks.py"
    script.write_text(FORKS, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script), mode], capture_output=True, text=True, timeout=180, check=False)
    assert done.stdout.split("\n")[:3] == ["with_it 0", "with_another 0", "with_none 0"], done.stderr
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("mode", "lines"),
    [
        ("cloud", 'userID:"u-1"\nRUNCOMFY_API_TOKEN:"t-1"\nversion_id: "v-1"'),
        ("serverless", 'RUNCOMFY_API_TOKEN:"t-1"\nRUNCOMFY_DEPLOYMENT_ID:"d-1"'),
    ],
)
def test_credentials_that_are_written_later_count(mode: str, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNCOMFY_CREDENTIALS_FILE", raising=False)
    for name in ("RUNCOMFY_USER_ID", "RUNCOMFY_API_TOKEN", "RUNCOMFY_WORKFLOW_VERSION_ID", "RUNCOMFY_DEPLOYMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    service = get_generation_service(mode)
    assert service.is_available() is False
    Path("runcomfy").mkdir()
    Path("runcomfy/credentials.txt").write_text(lines, encoding="utf-8")
    assert service.is_available() is True
    assert get_generation_service(mode).is_available() is True
    Path("runcomfy/credentials.txt").unlink()
    assert service.is_available() is False


@pytest.mark.parametrize(
    "path", ["missing.png", "", Path("missing.png"), Path("no/such/folder/render.png"), "there/render.png"]
)
@pytest.mark.parametrize("mode", ["local", "cloud", "serverless", "huggingface"])
def test_a_picture_that_is_not_there_is_a_file_not_found_however_it_is_named(path: Any, mode: str) -> None:
    Path("there").write_bytes(b"no folder")
    service = get_generation_service(mode)
    with pytest.raises(FileNotFoundError):
        service.generate_flux_depth_image(path, "a fox")
    with pytest.raises(FileNotFoundError):
        service.generate_3d_model(path)


@pytest.mark.parametrize(
    "asked",
    [
        {"prompt": 3},
        {"prompt": "a fox", "render_image_path": Path("missing.png")},
        {"prompt": "a fox", "render_image_path": 3},
        {"prompt": "a fox", "seed": "seven"},
        {"prompt": "a fox", "steps_flux": "many"},
    ],
)
@pytest.mark.parametrize("mode", ["local_comfyui", "cloud", "serverless"])
def test_both_in_one_never_raises(asked: dict[str, Any], mode: str) -> None:
    service: Any = get_generation_service(mode)
    answer = service.generate_flux_mesh_unified(**asked)
    assert answer["success"] is False
    assert isinstance(answer["error"], str)


@pytest.mark.parametrize("mode", ["local_comfyui", "cloud", "serverless"])
async def test_both_in_one_does_not_raise_for_wrong_settings_either(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNCOMFY_MAX_RETRIES", "often")
    service: Any = get_generation_service(mode)
    for answer in (service.generate_flux_mesh_unified("a fox"), await service.a_generate_flux_mesh_unified("a fox")):
        assert (answer["success"], answer["error_code"]) == (False, "setting-invalid")
        assert answer["generation_mode"] == mode
    assert service.is_available() is False


def test_an_engine_that_was_closed_says_so() -> None:
    engine = shared_engine()
    service = get_generation_service("local", engine)
    with pytest.raises(FileNotFoundError):
        service.generate_3d_model("missing.png")
    close_engines()
    with pytest.raises(RunComfyError) as caught:
        service.generate_3d_model("missing.png")
    assert caught.value.code == "interrupted"


class _Busy(BaseHTTPRequestHandler):
    """A ComfyUI whose queue is very long: every job in it is told with its whole graph."""

    def do_GET(self) -> None:
        body = json.dumps({"queue_running": [], "queue_pending": [[1, "x" * (5 << 20)]]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_a_comfyui_with_a_very_long_queue_is_one() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Busy) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            assert answers(f"http://127.0.0.1:{server.server_port}", seconds=30) == (True, "")
        finally:
            server.shutdown()
            serving.join()


def test_many_threads_may_keep_the_same_picture_at_once(tmp_path: Path) -> None:
    picture = tmp_path / "render.png"
    Image.radial_gradient("L").save(picture)
    for number in range(30):
        folder, gate = tmp_path / str(number), threading.Barrier(8)
        folder.mkdir()
        kept: list[str] = []

        def keep(folder: Path = folder, gate: threading.Barrier = gate, kept: list[str] = kept) -> None:
            gate.wait(30)
            kept.append(snapshot(picture, folder, max_pixels=10**6).path)

        threads = [threading.Thread(target=keep) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(kept) == 8
        assert len(set(kept)) == 1
        assert [str(path) for path in folder.iterdir()] == kept[:1]
