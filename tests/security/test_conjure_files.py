"""What requests without a token may make the service read: pictures and meshes of CONJURE's folder, nothing else."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from runcomfy.testing import samples
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.web import Answer, Web, serving_web

SECRET = "canary-of-a-file-77aa"
ASKS: list[tuple[str, str, dict[str, Any]]] = [
    ("/flux/depth", "control_image_path", {"prompt": "a cat", "seed": 7}),
    ("/partpacker/generate_3d", "image_path", {"seed": 7}),
    ("/blender/import_mesh", "mesh_path", {}),
]
posix = pytest.mark.skipif(sys.platform == "win32", reason="no such files there")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CONJURE's folder, with a file of somebody else's beside it."""
    root = tmp_path / "CONJURE"
    (root / "data" / "input").mkdir(parents=True)
    (root / "data" / "input" / "state.json").write_text('{"generation_mode": "local_comfyui"}', encoding="utf-8")
    outside = tmp_path / "private"
    outside.mkdir()
    (outside / "letter.txt").write_text(SECRET, encoding="utf-8")
    (outside / "photo.png").write_bytes(samples.png())
    (outside / "mesh.glb").write_bytes(b"glTF" + bytes(20))
    monkeypatch.chdir(root)
    return root


@pytest.fixture
async def api(project: Path, tmp_path: Path, clock: LoopClock) -> AsyncIterator[Web]:
    async with serving_web(tmp_path, clock) as api:
        yield api


async def ask(api: Web, call: str, key: str, rest: dict[str, Any], path: str, *, token: bool = False) -> Answer:
    return await api.post(call, {key: path, **rest}, token=token)


def same(answers: list[Answer]) -> bool:
    return len({(answer.status, answer.body) for answer in answers}) == 1


@pytest.mark.parametrize(("call", "key", "rest"), ASKS, ids=[key for _, key, _ in ASKS])
@pytest.mark.threat("S1")
async def test_what_lies_outside_is_not_even_looked_at(
    api: Web, project: Path, call: str, key: str, rest: dict[str, Any]
) -> None:
    outside = project.parent / "private"
    named = [
        *(str(outside / name) for name in ("letter.txt", "photo.png", "mesh.glb", "missing.png", ".", "x/y")),
        "../private/letter.txt",
        "../private/missing.png",
        "data/../../private/photo.png",
        f"../{project.name}/data/input/state.json",
        "~/.ssh/id_ed25519",
        "~root/.profile",
        "~nobody-of-that-name/x.png",
        "/etc/passwd",
        "/nothing/there",
        "/proc/self/environ",
        "//host/share/x.png",
    ]
    answers = [await ask(api, call, key, rest, path) for path in named]
    assert same(answers), dict(zip(named, answers, strict=True))
    assert answers[0].status == 422
    assert "outside of CONJURE's folder" in answers[0].json["detail"]
    assert not any(SECRET in repr(answer) for answer in answers)
    assert (await api.get("/jobs")).json["jobs"] == []


@posix
@pytest.mark.parametrize(("call", "key", "rest"), ASKS, ids=[key for _, key, _ in ASKS])
@pytest.mark.threat("S1")
async def test_a_link_leads_no_further_than_a_path(
    api: Web, project: Path, call: str, key: str, rest: dict[str, Any]
) -> None:
    outside = project.parent / "private"
    for name, target in {"a": "letter.txt", "b": "photo.png", "c": "missing.png"}.items():
        (project / "data" / f"{name}.png").symlink_to(outside / target)
    (project / "data" / "folder").symlink_to(outside, target_is_directory=True)
    (project / "data" / "round").symlink_to(project / "data" / "round")
    named = ["data/a.png", "data/b.png", "data/c.png", "data/folder/photo.png", "data/folder/missing.png"]
    answers = [await ask(api, call, key, rest, path) for path in named]
    assert same(answers), dict(zip(named, answers, strict=True))
    assert answers[0].status == 422
    assert "outside of CONJURE's folder" in answers[0].json["detail"]
    assert (await ask(api, call, key, rest, "data/round")).status == 422


@posix
@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize(("call", "key", "rest"), ASKS, ids=[key for _, key, _ in ASKS])
async def test_pipes_sockets_devices_and_folders_are_refused_at_once(
    api: Web, project: Path, call: str, key: str, rest: dict[str, Any], token: bool
) -> None:
    os.mkfifo(project / "data" / "pipe.png")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("data/socket.png")
    with listening:
        named = ["data/pipe.png", "data/socket.png", "data"]
        if token:
            (project / "data" / "zero.png").symlink_to("/dev/zero")
            named += ["/dev/zero", "/dev/tty", "/dev/stdin", "data/zero.png"]
        for path in named:
            async with asyncio.timeout(60):
                answer = await ask(api, call, key, rest, path, token=token)
            assert answer.status == 422, (path, answer)


@pytest.mark.parametrize(("call", "key", "rest"), ASKS, ids=[key for _, key, _ in ASKS])
async def test_what_is_inside_is_judged_by_its_content_and_never_told(
    api: Web, project: Path, call: str, key: str, rest: dict[str, Any]
) -> None:
    for name in ("letter.png", "letter.glb"):
        (project / "data" / name).write_text(f"{SECRET}\n" * 40, encoding="utf-8")
        answer = await ask(api, call, key, rest, f"data/{name}")
        assert answer.status == 422
        assert SECRET not in repr(answer)
        assert str(project) not in repr(answer)
    kept = await asyncio.to_thread(lambda: [path for path in api.state.rglob("*") if path.is_file()])
    assert not [path for path in kept if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize(("call", "key", "rest"), ASKS, ids=[key for _, key, _ in ASKS])
async def test_a_file_of_gigabytes_is_not_read(
    api: Web, project: Path, call: str, key: str, rest: dict[str, Any]
) -> None:
    for name, head in {"huge.png": samples.png(), "huge.glb": b"glTF" + bytes(20)}.items():
        with (project / "data" / name).open("wb") as file:
            file.write(head)
            file.truncate(5 << 30)
        answer = await ask(api, call, key, rest, f"data/{name}")
        assert answer.status == 422, answer


async def test_with_the_token_any_mesh_can_be_named(api: Web, project: Path) -> None:
    mesh = str(project.parent / "private" / "mesh.glb")
    assert (await ask(api, *ASKS[2], mesh)).status == 422
    answer = await ask(api, *ASKS[2], mesh, token=True)
    assert answer.status == 200, answer
    assert answer.json["data"]["mesh_path"] == mesh


async def test_a_path_in_the_folder_may_be_whole(api: Web, project: Path) -> None:
    (project / "data" / "mesh.glb").write_bytes(b"glTF" + bytes(20))
    assert (await ask(api, *ASKS[2], str(project / "data" / "mesh.glb"))).status == 200
    assert (await ask(api, *ASKS[2], str(Path("data", "mesh.glb")))).status == 200


async def test_a_setting_lets_them_name_files_anywhere(project: Path, tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock, conjure_anywhere=True) as api:
        assert (await ask(api, *ASKS[2], str(tmp_path / "private" / "mesh.glb"))).status == 200


@posix
async def test_data_may_lie_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: LoopClock) -> None:
    (tmp_path / "disk" / "input").mkdir(parents=True)
    (tmp_path / "disk" / "mesh.glb").write_bytes(b"glTF" + bytes(20))
    (tmp_path / "disk" / "input" / "state.json").write_text("{}", encoding="utf-8")
    root = tmp_path / "CONJURE"
    root.mkdir()
    (root / "data").symlink_to(tmp_path / "disk", target_is_directory=True)
    monkeypatch.chdir(root)
    async with serving_web(tmp_path, clock) as api:
        assert (await ask(api, *ASKS[2], "data/mesh.glb")).status == 200
        assert (await ask(api, *ASKS[2], str(tmp_path / "disk" / "mesh.glb"))).status == 200


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x.png", "a\0b", "x" * 4_000, "a/" * 2_000])
async def test_strange_paths_are_the_callers_mistake(api: Web, path: str) -> None:
    for call, key, rest in ASKS:
        answer = await ask(api, call, key, rest, path, token=True)
        assert 400 <= answer.status < 500, answer
