"""Files that the ComfyUI client sends and fetches: whole and once, or not at all. Time is virtual."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import itertools
import math
import os
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runcomfy.adapters.comfyui.upload import clean_name
from runcomfy.comfyui_workflow_client import ComfyUIWorkflowClient
from runcomfy.domain.exceptions import (
    AnswerUnreadable,
    DiskFull,
    DownloadFailed,
    InputFileInvalid,
    InputFileMissing,
    NotComfyUI,
    OutputMissing,
    ServerUnreachable,
)
from runcomfy.domain.job import FileRef
from runcomfy.testing.comfyui_clients import PAGE, a_client, put
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, Fault

# --- uploading ----------------------------------------------------------------------------------------------


@pytest.mark.fault(53)
@pytest.mark.parametrize(
    "fault", [Fault(keep=10), Fault(reply="lost"), Fault(status=500), Fault(truncate=5), Fault(body=b"{}")]
)
async def test_a_cut_upload_is_made_good(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, fault: Fault, tmp_path: Path
) -> None:
    content = os.urandom(5000)
    (tmp_path / "a.png").write_bytes(content)
    comfyui.faults.add("POST", "/upload/image", fault)
    name = await client.upload(str(tmp_path / "a.png"))
    assert (comfyui.folders.input / name).read_bytes() == content


@pytest.mark.fault(53)
@pytest.mark.parametrize(
    "fault",
    [
        Fault(work=False, status=200, body=b""),
        Fault(work=False, status=405, body=b""),
        Fault(work=False, status=501, body=b""),
        Fault(endless=True, body=b"[" * 1000),
    ],
)
async def test_a_proxy_that_hides_lengths_does_not_hide_an_upload(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, fault: Fault, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(os.urandom(5000))
    comfyui.faults.add("HEAD", "/view", fault, times=math.inf)
    await client.upload(str(tmp_path / "a.png"))
    assert comfyui.count("POST", "/upload/image") == 1
    (tmp_path / "b.png").write_bytes(os.urandom(5000))
    comfyui.faults.add("POST", "/upload/image", Fault(keep=10))
    name = await client.upload(str(tmp_path / "b.png"))
    assert (comfyui.folders.input / name).read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.fault(53)
async def test_an_upload_of_which_nothing_was_stored_is_told_as_that(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(os.urandom(5000))
    comfyui.faults.add("HEAD", "/view", Fault(work=False, status=405, body=b""), times=math.inf)
    comfyui.faults.add("POST", "/upload/image", Fault(keep=0), times=math.inf)
    with pytest.raises(ServerUnreachable, match="holds 0 of 5000 bytes"):
        await client.upload(str(tmp_path / "a.png"))


async def test_a_stranger_who_answers_when_an_upload_is_looked_up_is_not_asked_again(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(os.urandom(5000))
    comfyui.faults.add("HEAD", "/view", Fault(redirect="https://login.example/"), times=math.inf)
    with pytest.raises(NotComfyUI):
        await client.upload(str(tmp_path / "a.png"))
    assert comfyui.count("GET", "/view") == 0


async def test_a_large_file_that_is_written_to_while_it_is_sent_is_refused(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    (tmp_path / "big.bin").write_bytes(bytes(9 * 1024 * 1024))
    comfyui.faults.add("POST", "/upload/image", Fault(delay=5))
    sending = asyncio.create_task(client.upload(str(tmp_path / "big.bin"), kind="file"))
    await asyncio.sleep(2)
    with (tmp_path / "big.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputFileInvalid, match="changed while it was uploaded"):
        await sending


async def test_a_large_file_that_is_deleted_while_it_is_sent_again_is_missing(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    (tmp_path / "big.bin").write_bytes(bytes(9 * 1024 * 1024))
    comfyui.faults.add("POST", "/upload/image", Fault(delay=5, reply="lost"))
    sending = asyncio.create_task(client.upload(str(tmp_path / "big.bin"), kind="file"))
    await asyncio.sleep(2)
    (tmp_path / "big.bin").unlink()
    with pytest.raises(InputFileMissing, match="went away while it was uploaded"):
        await sending


async def test_a_folder_is_not_uploaded(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    with pytest.raises(InputFileMissing, match="cannot be read") as caught:
        await client.upload(str(tmp_path), kind="file")
    assert "ordinary file" in caught.value.hint
    assert comfyui.count("POST", "/upload/image") == 0


@pytest.mark.fault(32)
async def test_an_upload_that_is_looked_up_in_an_answer_without_an_end_says_that(
    comfyui: ComfyUIEmulator, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(os.urandom(5000))
    comfyui.faults.add("*", "/view", Fault(endless=True, body=b"[" * 1000), times=math.inf)
    async with a_client(comfyui.url, max_frame_bytes=10_000, max_retries=0) as client:
        with pytest.raises(AnswerUnreadable, match="sends more than 10000 bytes where a short answer was expected"):
            await client.upload(str(tmp_path / "a.png"))


@pytest.mark.fault(53)
async def test_a_name_taken_by_other_content_is_not_used(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    content = b"right" * 100
    (tmp_path / "a.png").write_bytes(content)
    taken = f"{hashlib.sha256(content).hexdigest()[:20]}_a.png"
    (comfyui.folders.input / taken).write_bytes(b"wrong" * 100)
    name = await client.upload(str(tmp_path / "a.png"))
    assert name != taken
    assert (comfyui.folders.input / name).read_bytes() == content


async def test_the_same_content_is_sent_once(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"same")
    names = await asyncio.gather(*(client.upload(str(tmp_path / name)) for name in ("a.png", "b.png") * 10))
    assert len(set(names)) == 1
    assert comfyui.count("POST", "/upload/image") == 1


async def test_one_cancelled_upload_does_not_hurt_the_other(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(b"same")
    comfyui.faults.add("POST", "/upload/image", Fault(delay=5))
    first = asyncio.create_task(client.upload(str(tmp_path / "a.png")))
    second = asyncio.create_task(client.upload(str(tmp_path / "a.png")))
    await asyncio.sleep(1)
    first.cancel()
    name = await second
    assert (comfyui.folders.input / name).read_bytes() == b"same"
    assert first.cancelled()


async def test_what_the_server_will_not_take_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "big.png").write_bytes(bytes(200_000))
    (tmp_path / "empty.png").write_bytes(b"")
    async with ComfyUIEmulator(max_upload_size_mb=0.1) as comfyui, a_client(comfyui.url) as client:
        with pytest.raises(InputFileInvalid, match="more than"):
            await client.upload(str(tmp_path / "big.png"))
        assert comfyui.count("POST", "/upload/image") == 1, "not asked before: the server said 413"
        await client.probe()
        with pytest.raises(InputFileInvalid, match="bytes this server takes"):
            await client.upload(str(tmp_path / "big.png"))
        with pytest.raises(InputFileInvalid, match="empty"):
            await client.upload(str(tmp_path / "empty.png"))
        assert comfyui.count("POST", "/upload/image") == 1


async def test_a_large_file_is_streamed(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    content = os.urandom(1024) * (9 * 1024)
    (tmp_path / "big.bin").write_bytes(content)
    name = await client.upload(str(tmp_path / "big.bin"), kind="file")
    assert (comfyui.folders.input / name).stat().st_size == len(content)


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("photo.png", "photo.png"),
        ("Bild größer.JPG", "Bild größer.JPG"),
        ('a"b\\c/d.png', "a_b_c_d.png"),
        ("..", "file"),
        ("...hidden", "hidden"),
        ("a..png", "a.png"),
        ("\x00\x1b[31m.png", "(31m.png"),
        ("name [output]", "name (output)"),
        (".png", "png"),
        ("日本語.webp", "日本語.webp"),
        ("\udce4.png", "png"),
        ("x. .y", "x.y"),
    ],
)
def test_names_are_made_safe(name: str, clean: str) -> None:
    assert clean_name(name) == clean


@given(st.text(max_size=300) | st.text("a. \xa0/\t\x00", max_size=12))
def test_any_name_becomes_one_that_the_server_takes(name: str) -> None:
    clean = clean_name(name)
    assert clean
    assert len(clean.encode()) <= 120
    assert ".." not in clean
    assert not set(clean) & set("/\\\"'\x00\r\n")
    assert not clean.startswith(".")
    assert clean == clean_name(clean)


# --- downloading --------------------------------------------------------------------------------------------


CONTENT = bytes(range(256)) * 4096  # 1 MiB


async def fetched(client: ComfyUIWorkflowClient, file: FileRef, folder: Path) -> bytes:
    target = folder / str(uuid.uuid4())
    got = await client.fetch(file, str(target))
    body = target.read_bytes()
    assert (got.size_bytes, got.sha256) == (len(body), hashlib.sha256(body).hexdigest())
    assert os.name == "nt" or target.stat().st_mode & 0o777 == 0o600
    return body


@pytest.mark.fault(49)
async def test_a_cut_download_goes_on_where_it_stopped(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(truncate=300_000), times=3)
    assert await fetched(client, file, tmp_path) == CONTENT


@pytest.mark.fault(49)
@pytest.mark.parametrize("claim", [len(CONTENT) + 50, len(CONTENT) - 50])
async def test_a_wrong_length_once_is_made_good(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path, claim: int
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(claim=claim))
    assert await fetched(client, file, tmp_path) == CONTENT


@pytest.mark.fault(49)
async def test_a_download_that_is_always_cut_fails_and_leaves_nothing(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(truncate=0), times=99)
    with pytest.raises(DownloadFailed) as caught:
        await client.fetch(file, str(tmp_path / "a"))
    assert caught.value.hint
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240


@pytest.mark.fault(50)
async def test_a_page_in_place_of_a_picture_is_no_result(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.png", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(body=PAGE.encode()), times=2)
    assert await fetched(client, file, tmp_path) == CONTENT
    comfyui.faults.add("GET", "/view", Fault(body=PAGE.encode()), times=99)
    with pytest.raises(DownloadFailed, match="web page") as caught:
        await client.fetch(file, str(tmp_path / "b"))
    assert "text/html" in str(caught.value.details["content_type"])
    assert not (tmp_path / "b").exists()


@pytest.mark.fault(52)
async def test_a_file_that_changes_while_it_is_read_is_read_again(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    path = comfyui.folders.output / "a.bin"
    newer = CONTENT[::-1]

    moments = itertools.count(1)

    def change(body: bytes, _: int) -> bytes:
        path.write_bytes(newer)
        os.utime(path, (moment := next(moments), moment))
        return body

    comfyui.faults.add("GET", "/view", Fault(corrupt=change))
    assert await fetched(client, file, tmp_path) == newer
    comfyui.faults.add("GET", "/view", Fault(corrupt=change), times=99)
    with pytest.raises(DownloadFailed, match="changes while it is read"):
        await client.fetch(file, str(tmp_path / "b"))


@pytest.mark.fault(52)
async def test_parts_of_two_files_are_never_joined(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    path = comfyui.folders.output / "a.bin"
    newer = CONTENT[::-1]

    def change(body: bytes, _: int) -> bytes:
        path.write_bytes(newer)
        os.utime(path, (1, 1))
        return body

    comfyui.faults.add("GET", "/view", Fault(corrupt=change, truncate=500_000))
    assert await fetched(client, file, tmp_path) == newer


@pytest.mark.fault(52)
async def test_a_part_of_another_place_than_was_asked_for_is_not_joined(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(truncate=300_000))
    rest, stat = len(CONTENT) - 300_000, (comfyui.folders.output / "a.bin").stat()
    elsewhere = {
        "Content-Range": f"bytes 0-{rest - 1}/{len(CONTENT)}",
        "ETag": f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"',
    }
    comfyui.faults.add("GET", "/view", Fault(status=206, corrupt=lambda *_: CONTENT[:rest], headers=elsewhere))
    assert await fetched(client, file, tmp_path) == CONTENT


@pytest.mark.fault(49)
async def test_a_server_that_sends_less_than_was_asked_for_is_asked_for_the_rest(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(truncate=300_000))
    comfyui.faults.add("GET", "/view", Fault(corrupt=lambda body, _: body[:100_000]), times=6)
    assert await fetched(client, file, tmp_path) == CONTENT


@pytest.mark.fault(50)
async def test_a_proxy_that_compresses_what_was_asked_for_as_it_is_gets_another_try(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    packed = Fault(corrupt=lambda body, _: gzip.compress(body), headers={"Content-Encoding": "gzip"})
    comfyui.faults.add("GET", "/view", packed)
    assert await fetched(client, file, tmp_path) == CONTENT
    comfyui.faults.add("GET", "/view", packed, times=99)
    with pytest.raises(DownloadFailed, match="it came compressed"):
        await client.fetch(file, str(tmp_path / "b"))


@pytest.mark.fault(50)
async def test_a_gateways_page_that_says_not_found_is_not_the_servers_word(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("GET", "/view", Fault.page(404), times=2)
    assert await fetched(client, file, tmp_path) == CONTENT


@pytest.mark.parametrize("status", [405, 501])
async def test_a_proxy_that_lets_no_head_through_does_not_hide_that_a_file_is_still_the_same(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path, status: int
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("HEAD", "/view", Fault.error(status), times=math.inf)
    assert await fetched(client, file, tmp_path) == CONTENT


async def test_what_is_here_whole_is_not_fetched_again_because_the_last_question_was_not_answered(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("HEAD", "/view", Fault.error(503))
    assert await fetched(client, file, tmp_path) == CONTENT
    assert comfyui.count("GET", "/view") == 2  # the file, and what lies behind its last byte


async def test_a_server_that_stays_away_in_the_middle_of_a_download_is_given_up(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(rate=100_000))
    fetching = asyncio.create_task(client.fetch(file, str(tmp_path / "a")))
    await asyncio.sleep(3.5)
    await comfyui.kill()
    with pytest.raises(ServerUnreachable):
        await fetching
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240


@pytest.mark.fault(32)
async def test_a_download_that_drips_ends_at_its_deadline(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(rate=10), times=99)
    began = asyncio.get_running_loop().time()
    with pytest.raises(DownloadFailed, match="longer than 1800 s"):
        await client.fetch(file, str(tmp_path / "a"))
    assert asyncio.get_running_loop().time() - began == pytest.approx(1800, abs=2)
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240


async def test_results_survive_a_restart_in_the_middle_of_the_download(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    file = put(comfyui, "a.bin", CONTENT)
    comfyui.faults.add("GET", "/view", Fault(rate=100_000))
    fetching = asyncio.create_task(fetched(client, file, tmp_path))
    await asyncio.sleep(3.5)
    await comfyui.kill()
    await asyncio.sleep(30)
    await comfyui.restart()
    assert await fetching == CONTENT


async def test_an_empty_file_is_no_result(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    with pytest.raises(DownloadFailed, match="empty"):
        await client.fetch(put(comfyui, "a.bin", b""), str(tmp_path / "a"))


async def test_a_result_over_the_limit_is_not_fetched(comfyui: ComfyUIEmulator, tmp_path: Path) -> None:
    async with a_client(comfyui.url, max_output_bytes=1000) as client:
        with pytest.raises(DownloadFailed, match="larger than the 1000 bytes"):
            await client.fetch(put(comfyui, "a.bin", CONTENT), str(tmp_path / "a"))


async def test_nothing_is_written_over(comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(Exception, match="could not create"):
        await client.fetch(put(comfyui, "a.bin", CONTENT), str(tmp_path / "a"))
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.fault(54)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
async def test_a_full_disk_is_said(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The file is opened as always; only where its bytes go is another place.
    monkeypatch.setattr(
        "runcomfy.adapters.comfyui.download.open_new",
        lambda _: open("/dev/full", "wb", buffering=0),  # noqa: PTH123, SIM115
    )
    with pytest.raises(DiskFull):
        await client.fetch(put(comfyui, "a.bin", CONTENT), str(tmp_path / "a"))


async def test_folders_in_names_go_where_the_server_wants_them(
    comfyui: ComfyUIEmulator, client: ComfyUIWorkflowClient, tmp_path: Path
) -> None:
    folder = comfyui.folders.output / "mesh" / "a b%date%"
    folder.mkdir(parents=True)
    (folder / "x+y & z?.glb").write_bytes(b"glTF")
    assert await fetched(client, FileRef("a b%date%/x+y & z?.glb", "mesh"), tmp_path) == b"glTF"
    with pytest.raises(OutputMissing):
        await client.fetch(FileRef("x+y & z?.glb", "mesh"), str(tmp_path / "a"))
