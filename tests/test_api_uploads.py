"""Files that clients send: judged before the answer, kept while a job needs them, swept when none does."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from launcher.errors import NotFound
from launcher.files import THUMBNAILS, Wanted, send_thumbnail, sweep_thumbnails
from launcher.tidying import FIRST_AFTER_S, SWEEP_EVERY_S
from launcher.upload_store import USED_BY, UploadStore
from runcomfy.domain.secret import Secret
from runcomfy.testing.clock import LoopClock
from runcomfy.testing.samples import one_color as png
from runcomfy.testing.web import Answer, Serving, Web, serving_web


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


@pytest.mark.threat("S6")
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
        answer = await api.ask("POST", "/uploads", data=endless(), headers=with_chunks)
        assert answer.status == 422, answer
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
        await asyncio.sleep(FIRST_AFTER_S + 1)
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

    async def none_of_both(keys: Collection[str]) -> Collection[str]:
        assert set(keys) == {"long gone", "new"}
        return ()

    await asyncio.to_thread(os.utime, Path(kept.path).parent, (0, 0))
    assert await store.sweep(none_of_both) == 1
    with pytest.raises(NotFound):
        await store.use([kept.path], "too late")


async def unknown(keys: Collection[str]) -> Collection[str]:
    return ()


async def known(keys: Collection[str]) -> Collection[str]:
    return keys


def aged(*paths: Path, days: float = 1) -> None:
    for path in paths:
        at = time.time() - days * 86_400
        os.utime(path, (at, at))


async def test_what_another_queue_on_the_same_folder_uses_is_left_to_it(tmp_path: Path) -> None:
    store = UploadStore(str(tmp_path), most_bytes=10_000, max_pixels=10_000)
    alone, shared = [await store.keep(png(color), "a.png") for color in ("red", "green")]
    await store.use([alone.path, shared.path], "theirs", queue="other")
    await store.use([shared.path], "ours", queue="this")
    folders = [Path(each.path).parent for each in (alone, shared)]

    async def ours_only(keys: Collection[str]) -> Collection[str]:
        assert set(keys) <= {"ours"}, "another queue's keys say nothing here"
        return ()

    await asyncio.to_thread(aged, *folders)
    assert await store.sweep(ours_only, queue="this") == 0
    assert await store.sweep(known, queue="other") == 0
    assert await store.sweep(unknown, queue="other") == 1, "what it alone used, and uses no more"
    assert [folder.is_dir() for folder in folders] == [False, True], "the other file is for both to let go"


async def test_a_queue_that_was_not_seen_for_three_months_keeps_nothing(tmp_path: Path) -> None:
    store = UploadStore(str(tmp_path), most_bytes=10_000, max_pixels=10_000)
    kept = await store.keep(png(), "a.png")
    await store.use([kept.path], "theirs", queue="other")
    [mark] = (tmp_path / "uploads_used_by").iterdir()
    await asyncio.to_thread(aged, Path(kept.path).parent, mark, days=89)
    assert await store.sweep(unknown, queue="this") == 0
    await store.sweep(known, queue="other")  # it is there again, and says so
    await asyncio.to_thread(aged, Path(kept.path).parent, days=200)
    assert await store.sweep(unknown, queue="this") == 0
    await asyncio.to_thread(aged, mark, days=91)
    assert await store.sweep(unknown, queue="this") == 1


@pytest.mark.fault(60)
async def test_a_clock_that_jumps_takes_no_file_from_who_is_about_to_use_it(
    tmp_path: Path, clock: LoopClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving_web(tmp_path, clock) as api:
        sent = [(await send(api, png(color))).json["upload"] for color in ("red", "green")]
        really = time.time
        monkeypatch.setattr(time, "time", lambda: really() + 86_401)
        await asyncio.sleep(FIRST_AFTER_S + 1)
        order = {"workflow": "image_invert", "image": f"upload:{sent[0]}"}
        job = (await api.post("/jobs", order)).json
        await asyncio.sleep(SWEEP_EVERY_S)
        assert [(api.state / "uploads" / each).is_dir() for each in sent] == [True, False]
        assert (await api.get(f"/jobs/{job['id']}/inputs/0")).status == 200


async def test_a_note_that_a_crash_left_torn_names_the_jobs_that_follow_it(tmp_path: Path, clock: LoopClock) -> None:
    async with serving_web(tmp_path, clock) as api:
        torn, used = [(await send(api, png(color))).json["upload"] for color in ("red", "green")]
        notes = [api.state / "uploads" / each / USED_BY for each in (torn, used)]
        for note in notes:
            await asyncio.to_thread(note.write_bytes, b"a queue\t\xff\x00\xc3")
        job = (await api.post("/jobs", {"workflow": "image_invert", "image": f"upload:{used}"})).json
        await asyncio.to_thread(aged, *[note.parent for note in notes])
        await asyncio.sleep(FIRST_AFTER_S + 1)
        assert [note.parent.is_dir() for note in notes] == [False, True]
        assert (await api.get(f"/jobs/{job['id']}/inputs/0")).status == 200


async def test_what_another_process_takes_while_it_is_swept_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is the process's own: another one may take the file between the look and the removal."""
    ours = UploadStore(str(tmp_path), most_bytes=10_000, max_pixels=10_000)
    theirs = UploadStore(str(tmp_path), most_bytes=10_000, max_pixels=10_000)
    kept = await ours.keep(png(), "a.png")
    folder = Path(kept.path).parent
    await asyncio.to_thread(aged, folder)
    rename = Path.rename

    def taken_first(self: Path, target: Any) -> Path:
        if self == folder:
            theirs._use([kept.path], "new", "this")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", taken_first)
    assert await ours.sweep(unknown, queue="this") == 0
    assert await asyncio.to_thread(Path(kept.path).is_file)


async def test_two_services_on_one_state_folder_leave_each_others_uploads(tmp_path: Path, clock: LoopClock) -> None:
    elsewhere = {"database": Secret(str(tmp_path / "second.sqlite3"))}
    async with serving_web(tmp_path, clock) as api:
        used = (await send(api, png())).json["upload"]
        order = {"workflow": "image_invert", "image": f"upload:{used}"}
        job = (await api.post("/jobs", order)).json
        async with serving_web(tmp_path, clock, queue=elsewhere) as other:
            assert (await other.get("/jobs")).json["jobs"] == []
            await asyncio.to_thread(aged, api.state / "uploads" / used)
            await asyncio.sleep(FIRST_AFTER_S + 1)
        assert (await api.get(f"/jobs/{job['id']}/inputs/0")).status == 200


def test_small_pictures_go_when_nobody_looks_and_when_there_are_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / THUMBNAILS
    folder.mkdir()
    for day in (0, 1, 2, 29, 31):
        (folder / f"{day}.webp").write_bytes(bytes(1_000))
        aged(folder / f"{day}.webp", days=day)
    assert sweep_thumbnails(str(tmp_path)) == 1
    monkeypatch.setattr("launcher.files.THUMBNAILS_MOST", 2_500)
    assert sweep_thumbnails(str(tmp_path)) == 2
    assert {path.name for path in folder.iterdir()} == {"0.webp", "1.webp"}
    assert sweep_thumbnails(str(tmp_path / "nowhere")) == 0


async def test_a_small_picture_that_is_looked_at_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png())
    wanted = Wanted(str(path), "a.png", "image/png")
    for _ in range(2):  # made, and found
        assert (await send_thumbnail(str(tmp_path), wanted)).status_code == 200
        [small] = (tmp_path / THUMBNAILS).iterdir()
        assert sweep_thumbnails(str(tmp_path), now=time.time() + 29 * 86_400) == 0
        await asyncio.to_thread(aged, small, days=29)
    await send_thumbnail(str(tmp_path), wanted)
    assert sweep_thumbnails(str(tmp_path), now=time.time() + 20 * 86_400) == 0
