"""The demo does what it says: a whole picture and a mesh any viewer opens, the bill, and a proof that nothing bills."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
from PIL import Image

from runcomfy.cli import demo as module
from runcomfy.cli.main import call, comfyctl
from runcomfy.testing.emulators.runcomfy import RunComfyEmulator

Demo = Callable[..., tuple[int, str, str]]


@pytest.fixture
def demo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Demo:
    """Run `comfyctl demo` somewhere else, as a newcomer without account or settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUNCOMFY_CREDENTIALS_FILE")
    monkeypatch.delenv("RUNCOMFY_STATE_DIR")
    monkeypatch.setattr(module, "BOOT_SECONDS", 0.2)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = call(comfyctl, ["demo", *arguments])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def results(out: str) -> dict[str, Path]:
    found = re.findall(r"^   (image|mesh) +(.+) \([\d,]+ bytes, verified\)$", out, re.MULTILINE)
    return {kind: Path(path) for kind, path in found}


def vertices(glb: Path) -> int:
    content = glb.read_bytes()
    magic, version, length, size = struct.unpack_from("<4sIII", content)
    assert (magic, version, length) == (b"glTF", 2, len(content))
    described = json.loads(content[20 : 20 + size])
    primitive = described["meshes"][0]["primitives"][0]
    return int(described["accessors"][primitive["attributes"]["POSITION"]]["count"])


def test_a_newcomer_sees_the_whole_product_work(demo: Demo, tmp_path: Path) -> None:
    code, out, err = demo()
    assert code == 0, err
    assert out.splitlines()[0] == (
        "DEMO: the cloud is emulated on this computer and no GPU model runs; nothing here costs money."
    )
    files = results(out)
    assert files["image"].is_relative_to(tmp_path / "outputs" / "demo")
    with Image.open(files["image"]) as picture:
        picture.load()
        assert min(picture.size) >= 256
    assert vertices(files["mesh"]) > 1000
    assert re.search(r"^   seed  3\.noise_seed = \d+$", out, re.MULTILINE)
    assert re.search(r"^   seed  32\.seed = \d+$", out, re.MULTILINE)
    percents = [float(found) for found in re.findall(r"running +([\d.]+)%", err)]
    assert percents == sorted(percents)
    assert len(set(percents)) > 10, "progress is live, node by node"
    ours = re.search(r"^   total +\$([\d.]+)$", out, re.MULTILINE)
    theirs = re.search(r"books: 1 machine\(s\), ([\d.]+) s billed, \$([\d.]+); billing now: 0$", out, re.MULTILINE)
    assert ours is not None
    assert theirs is not None
    assert abs(Decimal(ours[1]) - Decimal(theirs[2])) < Decimal("0.0003"), "our bill is the cloud's, within a second"
    assert out.rstrip().endswith("nothing bills any more")
    assert not (tmp_path / "state").exists(), "the demo keeps no state"


REAL = {
    "RUNCOMFY_DATABASE_URL": "postgresql://nobody:secret@127.0.0.1:1/books",
    "COMFYUI_AGENT_DATABASE": "real_queue.sqlite3",
    "COMFYUI_AGENT_WHERE": "cloud",
    "COMFYUI_AGENT_API_BASE_URL": "http://127.0.0.1:1",
    "COMFYUI_REQUEST_TIMEOUT": "not a time",
    "RUNCOMFY_BUDGET_DAY": "0.000001",
    "RUNCOMFY_STATE_DIR": "real_state",
    "RUNCOMFY_API_BASE_URL": "http://127.0.0.1:1",
    "RUNCOMFY_API_TOKEN": "real",
    "RUNCOMFY_SERVER_TYPE": "no-such-type",
}


def test_nothing_of_the_users_is_used_or_touched(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated machines in real books would be looked for in the real account, and real jobs run on nothing."""
    for name, value in REAL.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "credentials.txt").write_text("RUNCOMFY_BUDGET_MONTH:0.000001\nuserID:somebody\n", encoding="utf-8")
    (tmp_path / "jobs" / "processing").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = demo("--out", "results")
    assert code == 0, err
    assert out.rstrip().endswith("nothing bills any more")
    assert sorted(p for p in tmp_path.rglob("*") if not p.is_relative_to(tmp_path / "results")) == before
    assert {name: os.environ.get(name) for name in REAL} == REAL, "the environment is as it was"


def test_picture_prompt_seed_and_place_can_be_chosen(demo: Demo, tmp_path: Path) -> None:
    mine = tmp_path / "mine.png"
    Image.linear_gradient("L").convert("RGB").save(mine)
    _, out, _ = demo("--image", "mine.png", "--prompt", "a bronze statue", "--seed", "5", "--out", "here")
    files = results(out)
    assert re.findall(r"seed  (.*) = 5$", out, re.MULTILINE) == ["3.noise_seed", "32.seed"]
    manifest = json.loads((files["mesh"].parent / "manifest.json").read_text(encoding="utf-8"))
    applied = {entry["target"]: entry["value"] for entry in manifest["inputs"]}
    assert files["mesh"].is_relative_to(tmp_path / "here")
    assert applied["34.t5xxl"] == applied["34.clip_l"] == "a bronze statue"
    assert applied["16.image"] == "@mine.png"


def test_a_wrong_picture_is_told_before_anything_is_launched(demo: Demo, tmp_path: Path) -> None:
    code, out, err = demo("--image", "no-such.png")
    assert code == 2
    assert "launching" not in out
    assert [line[:7] for line in err.splitlines()] == ["error: ", "  -> ch"]


def test_a_machine_that_still_bills_fails_the_demo(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof is read from the cloud's books: a stop that only we believe in does not pass."""
    start = RunComfyEmulator.start

    async def with_a_leak(cloud: RunComfyEmulator) -> str:
        url = await start(cloud)
        cloud.foreign("large").foreign = False  # bills, and nobody here ever launched it
        return url

    monkeypatch.setattr(RunComfyEmulator, "start", with_a_leak)
    code, out, err = demo()
    assert code == 4
    assert "still billing" in err
    assert "nothing bills any more" not in out


def test_outside_of_the_demo_its_failure_is_reported(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    start = RunComfyEmulator.start

    async def refusing(cloud: RunComfyEmulator) -> str:
        url = await start(cloud)
        cloud.next_call("POST servers", status=402, body={"message": "balance is too low"})
        return url

    monkeypatch.setattr(RunComfyEmulator, "start", refusing)
    code, _, err = demo()
    assert code == 4
    assert "error: " in err
    assert "Traceback" not in err
