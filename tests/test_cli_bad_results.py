"""Results that cannot be had: cut downloads, names that lead elsewhere, full disks; two lines say so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.comfyui.faults import Fault
from runcomfy.testing.in_thread import served

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def picture(picture: Path) -> str:
    return str(picture)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def two_lines(err: str) -> bool:
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "  -> "))]
    return len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("  -> ")


def test_a_download_that_is_always_cut_leaves_nothing_behind(comfy: Any, picture: str, tmp_path: Path) -> None:
    with served(ComfyUIEmulator) as server:
        server.call(lambda s: s.faults.add("GET", "/view", Fault.cut(0), times=99))
        before = files_below(tmp_path)
        code, out, err = comfy("run", "image_invert", "--image", picture, "--server", server.emulator.url)
    assert (code, out, two_lines(err)) == (7, "", True), err
    assert {name for name in files_below(tmp_path) - before if not name.startswith("state")} == set()


def test_a_name_that_leads_elsewhere_leads_nowhere(comfy: Any, picture: str, tmp_path: Path) -> None:
    """The server names its result `../../x.png` and delivers it under that name: it gets a name of ours."""
    (tmp_path / "deep" / "er").mkdir(parents=True)

    def hostile(body: bytes, _: int) -> bytes:
        return re.sub(rb'"filename": ?"[^"]*"', b'"filename": "../../x.png"', body)

    content = Path(picture).read_bytes()
    with served(ComfyUIEmulator) as server:
        server.call(lambda s: s.faults.add("GET", "/history/*", Fault.corrupted(hostile), times=99))
        server.call(lambda s: s.faults.add("GET", "/view", Fault.saying(content, "image/png"), times=99))
        before = files_below(tmp_path)
        code, _, err = comfy(
            "run", "image_invert", "--image", picture, "--server", server.emulator.url, "--out", "deep/er"
        )
    assert code == 0, err
    new = {Path(name) for name in files_below(tmp_path) - before if not name.startswith("state")}
    assert {path.name for path in new} == {"inverted.png", "manifest.json"}
    assert all(path.is_relative_to("deep/er") for path in new)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_full_disk_is_two_lines_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    noise = tmp_path / "noise.png"
    Image.effect_noise((400, 400), 90).convert("RGB").save(noise)
    before = files_below(tmp_path)
    # No file of this process may grow beyond 60 kB: what a quota, or a disk with that much room, does.
    limited = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
    with served(ComfyUIEmulator) as server:
        done = subprocess.run(
            [sys.executable, "-c", limited + "runpy.run_module('runcomfy.cli.main', run_name='__main__')",
             "run", "image_invert", "--image", str(noise), "--server", server.emulator.url],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 9, done.stderr
    assert two_lines(done.stderr)
    assert "[disk-full]" in done.stderr
    assert {name for name in files_below(tmp_path) - before if not name.startswith("state")} == set()


@pytest.mark.fault(54)
@pytest.mark.processes
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_goes_to_a_full_disk_is_two_lines_and_the_code_for_disks(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "runcomfy.cli.main", "workflows", "ls"],
            cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=full, stderr=subprocess.PIPE, text=True,
            check=False,
        )  # fmt: skip
    assert done.returncode == 9, done.stderr
    assert two_lines(done.stderr)
    assert "[disk-full]" in done.stderr
