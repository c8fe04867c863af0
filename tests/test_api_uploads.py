"""Files that clients send: judged before the answer, kept while a job needs them, swept when none does."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from PIL import Image

from launcher.errors import NotFound
from launcher.upload_store import UploadStore
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.web import Answer, Serving, Web, serving_web


def png(color: str = "red", side: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, "PNG")
    return buffer.getvalue()


def form(data: bytes, name: str = "file", file: str = "a.png") -> aiohttp.FormData:
    fields = aiohttp.FormData()
    fields.add_field(name, data, filename=file, content_type="application/octet-stream")
    return fields


async def send(api: Web, data: bytes, file: str = "a.png") -> Answer:
    return await api.ask("POST", "/uploads", data=form(data, file=file))


def folders(api: Web) -> list[Path]:
    return sorted((api.state / "uploads").glob("*"))


async def test_an_upload_is_kept_under_names_of_ours_and_used_by_a_job(serving_api: Serving) -> None:
    async with serving_api() as api:
        kept = await send(api, png(), file="../../etc/passwd; rm -rf.exe")
        assert kept.status == 201, kept
        assert kept.json["media_type"] == "image/png"
        assert kept.json["size_bytes"] == len(png())
        (folder,) = folders(api)
        assert folder.name == kept.json["upload"]
        (file,) = list(folder.iterdir())
        assert file.name == kept.json["file"]
        assert file.suffix == ".png"
        if os.name == "posix":
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        for value in (f"upload:{kept.json['upload']}", f"@upload:{kept.json['upload']}"):
            made = await api.post("/jobs", {"workflow": "image_invert", "inputs": {"image": value}})
            assert made.status == 201, made
            assert (await api.ended(made.json["id"]))["status"] == "done"


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"just words, no picture", "text"),
        (b"<!doctype html><script>alert(1)</script>", "web page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"></svg>', "SVG"),
        (b"\x7fELF" + bytes(200), "unknown format"),
        (b"\x1f\x8b\x08\x00" + bytes(200), "GZIP"),
        (png()[:40], "damaged"),
        (b"GIF89a" + bytes(20), "damaged"),
    ],
)
async def test_what_no_workflow_takes_is_not_kept(tmp_path: Path, clock: LoopClock, data: bytes, word: str) -> None:
    async with serving_web(tmp_path, clock) as api:
        answer = await send(api, data)
        assert answer.status == 422, answer
        assert word in answer.json["detail"]
        assert str(tmp_path) not in answer.body.decode()
        assert folders(api) == []


async def test_a_picture_that_would_fill_the_memory_is_refused_by_its_header(tmp_path: Path, clock: LoopClock) -> None:
    head = bytearray(png())
    head[16:24] = (60_000).to_bytes(4, "big") * 2
    async with serving_web(tmp_path, clock) as api:
        answer = await send(api, bytes(head))
        assert answer.status == 422
        assert folders(api) == []


async def test_a_file_that_is_too_large_is_noticed_while_it_arrives(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock, max_upload_bytes=200_000) as api:
        answer = await send(api, png() + bytes(300_000))
        assert answer.status == 413, answer
        assert folders(api) == []
        assert (await send(api, png())).status == 201

        async def endless() -> Any:
            for _ in range(10_000):
                yield bytes(10_000)

        with_chunks = {"Content-Type": "multipart/form-data; boundary=x"}
        try:
            answer = await api.ask("POST", "/uploads", data=endless(), headers=with_chunks)
            assert answer.status in (400, 413, 422), answer
        except aiohttp.ClientConnectionError:
            pass  # it was refused while it was still being sent
        assert len(folders(api)) == 1


@pytest.mark.parametrize("name", ["other", "image"])
async def test_an_upload_is_one_file_in_its_own_field(tmp_path: Path, clock: LoopClock, name: str) -> None:
    async with serving_web(tmp_path, clock) as api:
        assert (await api.ask("POST", "/uploads", data=form(png(), name=name))).status == 422
        two = form(png())
        two.add_field("file", png(), filename="b.png")
        assert (await api.ask("POST", "/uploads", data=two)).status == 422
        assert (await api.post("/uploads", {"file": "x"})).status == 415
        assert folders(api) == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="tells files apart as Linux does")
async def test_a_full_disk_is_said_and_leaves_nothing_half(
    tmp_path: Path, clock: LoopClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving_web(tmp_path, clock) as api:
        real = os.fsync

        def full(fd: int) -> None:
            if "uploads" in str(Path(f"/proc/self/fd/{fd}").readlink()):
                raise OSError(errno.ENOSPC, "No space left on device")
            real(fd)

        monkeypatch.setattr(os, "fsync", full)
        answer = await send(api, png())
        assert answer.status == 507, answer
        assert answer.json["error"]["code"] == "disk-full"
        body = {"workflow": "image_invert", "image": "data:image/png;base64,iVBORw0KGgo="}
        assert (await api.post("/jobs", body)).status == 507
        monkeypatch.undo()
        assert folders(api) == []
        assert (await api.get("/jobs")).json["jobs"] == []


async def test_what_no_job_uses_is_swept_after_a_day_and_what_one_uses_stays(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        used, unused, fresh = [(await send(api, png(color))).json["upload"] for color in ("red", "green", "blue")]
        job = (await api.post("/jobs", {"workflow": "image_invert", "image": f"upload:{used}"})).json
        failed = await api.post("/jobs", {"workflow": "image_invert", "image": f"upload:{unused}", "priority": 5000})
        assert failed.status == 422
        for name in (used, unused):
            await asyncio.to_thread(os.utime, api.state / "uploads" / name, (0, 0))
        await asyncio.sleep(3_700)  # swept once an hour, when somebody sends something
        assert (await send(api, png("white"))).status == 201
        left = {folder.name for folder in folders(api)}
        assert used in left
        assert fresh in left
        assert unused not in left
        again = await api.post(f"/jobs/{job['id']}/again")
        assert again.status == 201
        gone = await api.post("/jobs", {"workflow": "image_invert", "image": f"upload:{unused}"})
        assert gone.status == 404


async def test_a_key_used_again_with_other_files_leaves_none_of_them(tmp_path: Path, clock: LoopClock) -> None:
    """They would be kept for as long as the key's job is, and nobody counts requests with a known key."""
    async with serving_web(tmp_path, clock) as api:
        key = {"Idempotency-Key": "order-17"}

        async def order(color: str) -> int:
            form = aiohttp.FormData({"workflow": "image_invert"})
            form.add_field("image", png(color), filename="a.png")
            return (await api.ask("POST", "/jobs", data=form, headers=key)).status

        assert await order("red") == 201
        kept = folders(api)
        assert [await order(color) for color in ("green", "blue", "red")] == [409, 409, 200]
        assert folders(api) == kept


async def test_what_is_taken_into_use_while_it_is_swept_stays(tmp_path: Path) -> None:
    store = UploadStore(str(tmp_path), most_bytes=10_000, max_pixels=10_000)
    kept = await store.keep(png(), "a.png")
    await store.use([kept.path], "long gone")
    await asyncio.to_thread(os.utime, Path(kept.path).parent, (0, 0))

    async def while_it_is_asked(keys: Collection[str]) -> Collection[str]:
        await store.use([kept.path], "new")
        return ()

    assert await store.sweep(while_it_is_asked) == 0
    assert await asyncio.to_thread(Path(kept.path).is_file)

    async def unknown(keys: Collection[str]) -> Collection[str]:
        assert set(keys) == {"long gone", "new"}
        return ()

    await asyncio.to_thread(os.utime, Path(kept.path).parent, (0, 0))
    assert await store.sweep(unknown) == 1
    with pytest.raises(NotFound):
        await store.use([kept.path], "too late")
