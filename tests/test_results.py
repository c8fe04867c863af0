"""A job's folder: names of our own, nothing final before everything is whole, and everything or nothing after."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import textwrap
import threading
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from runcomfy.adapters.files import Disk, make_private_dir, remove_quietly
from runcomfy.adapters.results import DiskJobFolder, DiskResults
from runcomfy.domain.exceptions import (
    DiskFull,
    InputFileInvalid,
    InputFileMissing,
    LocalError,
    OutputCorrupt,
    ValueInvalid,
)
from runcomfy.domain.job import JobId, Output, OutputKind
from runcomfy.domain.settings import FileSettings
from runcomfy.ports.results import JobFolder, Media, ResultFile, Results
from runcomfy.testing import samples

posix = pytest.mark.skipif(os.name == "nt", reason="permissions and links as on POSIX")
JOB = JobId("job-1")
PNG = samples.png()


@pytest.fixture
def settings(tmp_path: Path) -> FileSettings:
    return FileSettings(state_dir=str(tmp_path / "state"))


@pytest.fixture
def results(settings: FileSettings) -> DiskResults:
    return DiskResults(settings)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "outputs"


@pytest.fixture
async def folder(results: DiskResults, out: Path) -> DiskJobFolder:
    return await results.open_folder(JOB, under=str(out))


def download(folder: JobFolder, content: bytes) -> str:
    """What the ComfyUI client does: a new file under the partial name."""
    partial = folder.partial()
    with Path(partial).open("xb") as file:
        file.write(content)
    return partial


def as_result(partial: str, media: Media, node: str = "9", file_name: str = "", remote_name: str = "") -> ResultFile:
    content = Path(partial).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return ResultFile(
        partial, node, media, len(content), digest, name="picture", file_name=file_name, remote_name=remote_name
    )


async def fetched(folder: JobFolder, content: bytes = PNG, node: str = "9", file_name: str = "") -> ResultFile:
    partial = download(folder, content)
    return as_result(partial, await folder.inspect(partial), node, file_name)


def names(path: Path | str) -> list[str]:
    return sorted(entry.name for entry in Path(path).iterdir())


def content(path: str) -> bytes:
    return Path(path).read_bytes()


def permissions(path: Path | str) -> int:
    return Path(path).stat().st_mode & 0o777


def overwrite(path: str, new: bytes) -> None:
    Path(path).write_bytes(new)


def swap_for_link(path: str, target: Path) -> None:
    Path(path).unlink()
    Path(path).symlink_to(target)


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


class FailingDisk(Disk):
    """A disk whose n-th call of any kind fails, once."""

    def __init__(self, fails_at: int, code: int) -> None:
        self.calls: list[str] = []
        self._fails_at = fails_at
        self._code = code

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) == self._fails_at:
            raise OSError(self._code, os.strerror(self._code))

    def fsync(self, fd: int) -> None:
        self._call("fsync")
        super().fsync(fd)

    def rename(self, source: str, target: str) -> None:
        self._call("rename")
        super().rename(source, target)

    def replace(self, source: str, target: str) -> None:
        self._call("replace")
        super().replace(source, target)

    def fsync_directory(self, path: str) -> None:
        super().fsync_directory(path)
        self._call("fsync_directory")


def test_the_adapter_keeps_the_port(settings: FileSettings) -> None:
    kept: Results = DiskResults(settings)
    folder: JobFolder = DiskJobFolder("x", settings=settings)
    assert callable(kept.open_folder)
    assert folder.path == "x"


# --- the folder ---


@posix
async def test_the_folder_is_made_for_this_user_alone(results: DiskResults, out: Path) -> None:
    before = os.umask(0)
    try:
        folder = await results.open_folder(JOB, under=str(out))
    finally:
        os.umask(before)
    assert folder.path == str(out / "job-1")
    assert permissions(folder.path) == 0o700
    assert names(folder.path) == []


async def test_a_job_s_results_are_never_written_over_another_s(
    results: DiskResults, folder: DiskJobFolder, out: Path
) -> None:
    await folder.commit([await fetched(folder)], {})
    with pytest.raises(LocalError, match="already holds files"):
        await results.open_folder(JOB, under=str(out))


async def test_a_folder_that_a_crash_left_is_used_again(results: DiskResults, folder: DiskJobFolder, out: Path) -> None:
    download(folder, PNG[:100])
    (Path(folder.path) / "rejected-1.png").write_bytes(b"evidence")
    again = await results.open_folder(JOB, under=str(out))
    assert names(again.path) == ["rejected-1.png"]
    with pytest.raises(OutputCorrupt):
        await again.inspect(download(again, samples.HTML))
    assert names(again.path) == ["rejected-1.png", "rejected-1.txt"]
    assert (out / "job-1" / "rejected-1.png").read_bytes() == b"evidence"


@posix
async def test_a_link_planted_in_the_folder_s_place_is_refused(results: DiskResults, out: Path, tmp_path: Path) -> None:
    """Threat S16."""
    (tmp_path / "elsewhere").mkdir()
    make_private_dir(out)
    (out / "job-1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(LocalError, match="not a folder"):
        await results.open_folder(JOB, under=str(out))
    assert names(tmp_path / "elsewhere") == []


async def test_a_folder_that_cannot_be_made_is_known_before_money_is_spent(
    results: DiskResults, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(LocalError) as caught:
        await results.open_folder(JOB, under=str(tmp_path / "file"))
    assert caught.value.hint
    assert caught.value.exit_code == 9


@pytest.mark.fault(54)
async def test_a_disk_with_hardly_any_room_is_known_before_money_is_spent(
    results: DiskResults, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000, total=10**12))
    with pytest.raises(DiskFull, match="only 1 MB are free"):
        await results.open_folder(JOB, under=str(out))
    assert names(out) == []


@pytest.mark.fault(54)
async def test_a_small_disk_is_asked_for_a_tenth_of_itself(
    results: DiskResults, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 20 MB, a RAM disk for example, could never give what a large one is asked for."""
    room = SimpleNamespace(free=1_900_000, total=20_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: room)
    with pytest.raises(DiskFull) as caught:
        await results.open_folder(JOB, under=str(out))
    assert "free at least 2 MB" in caught.value.hint
    room.free = 2_100_000
    await results.open_folder(JOB, under=str(out))


@pytest.mark.fault(54)
@pytest.mark.fault(58)
@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, DiskFull), (errno.EIO, LocalError)])
async def test_a_disk_that_takes_no_probe_is_known_before_money_is_spent(
    settings: FileSettings, out: Path, code: int, error: type[LocalError]
) -> None:
    with pytest.raises(error):
        await DiskResults(settings, disk=FailingDisk(1, code)).open_folder(JOB, under=str(out))
    assert names(out) == []


# --- inspecting ---


@pytest.mark.fault(50)
@pytest.mark.fault(51)
@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (samples.HTML, "rejected-1.txt"),
        (PNG[:-20], "rejected-1.png"),
        (samples.glb() + b"\0", "rejected-1.glb"),
        (b"", "rejected-1.bin"),
    ],
)
async def test_what_is_refused_is_kept_for_a_look(folder: DiskJobFolder, content: bytes, kept: str) -> None:
    with pytest.raises(OutputCorrupt) as caught:
        await folder.inspect(download(folder, content), expected=OutputKind.IMAGE)
    assert names(folder.path) == [kept]
    assert caught.value.details["kept"] == str(Path(folder.path) / kept)
    assert kept in caught.value.hint
    await folder.abandon()
    assert names(folder.path) == [kept]


async def test_a_second_download_may_succeed_where_the_first_was_broken(folder: DiskJobFolder) -> None:
    with pytest.raises(OutputCorrupt):
        await folder.inspect(download(folder, PNG[:-20]), expected=OutputKind.IMAGE)
    (output,) = await folder.commit([await fetched(folder)], {})
    assert names(folder.path) == ["9-1.png", "manifest.json", "rejected-1.png"]
    assert content(output.path) == PNG


async def test_a_path_that_is_not_this_folder_s_is_a_defect(folder: DiskJobFolder, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(PNG)
    with pytest.raises(ValueError, match="not a partial file"):
        await folder.inspect(str(tmp_path / "mine.png"))
    file = await fetched(folder)
    with pytest.raises(ValueError, match="not a partial file"):
        await folder.commit([ResultFile(str(tmp_path / "mine.png"), "9", file.media, 1, "")], {})
    assert (tmp_path / "mine.png").exists()


@pytest.mark.threat("S16")
def test_partial_names_cannot_be_guessed_and_say_what_they_are(settings: FileSettings) -> None:
    """Threat S16."""
    made = {Path(DiskJobFolder("x", settings=settings).partial()).name for _ in range(50)}
    assert len(made) == 50
    assert all(name.startswith(".partial-1-") for name in made)


@posix
@pytest.mark.threat("S16")
async def test_a_link_planted_in_a_download_s_place_is_not_followed(folder: DiskJobFolder, tmp_path: Path) -> None:
    """Threat S16: somebody who can write here swaps the file for a link after the download."""
    (tmp_path / "secret.png").write_bytes(PNG)
    file = await fetched(folder)
    swap_for_link(file.partial, tmp_path / "secret.png")
    with pytest.raises(LocalError):
        await folder.inspect(file.partial)
    with pytest.raises(LocalError):
        await folder.commit([file], {})
    with pytest.raises(LocalError):
        await folder.write_text(file.partial, "ours")
    assert "manifest.json" not in names(folder.path)
    assert (tmp_path / "secret.png").read_bytes() == PNG


# --- committing ---


async def test_results_are_final_together_with_a_manifest_that_names_them(folder: DiskJobFolder) -> None:
    picture = await fetched(folder, PNG, "9", "flux.png")
    partial = download(folder, samples.glb())
    mesh = as_result(partial, await folder.inspect(partial), "12:3", remote_name="mesh/x.glb")
    note = folder.partial()
    size, digest = await folder.write_text(note, "größer")
    text = ResultFile(note, "30", await folder.inspect(note), size, digest)

    outputs = await folder.commit([picture, mesh, text], {"job_id": JOB, "cost_usd": Decimal("0.0123")})

    assert names(folder.path) == ["12_3-1.glb", "30-1.txt", "flux.png", "manifest.json"]
    assert [Path(output.path).name for output in outputs] == ["flux.png", "12_3-1.glb", "30-1.txt"]
    assert [output.kind for output in outputs] == [OutputKind.IMAGE, OutputKind.MESH, OutputKind.TEXT]
    assert all(sha256(output.path) == output.sha256 for output in outputs)
    assert content(outputs[2].path).decode() == "größer"
    manifest = json.loads((Path(folder.path) / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["job_id"], manifest["cost_usd"]) == ("job-1", "0.0123")
    assert manifest["outputs"][1] == {
        "node": "12:3",
        "name": "picture",
        "kind": "mesh",
        "file": "12_3-1.glb",
        "mime": "model/gltf-binary",
        "size_bytes": len(samples.glb()),
        "sha256": hashlib.sha256(samples.glb()).hexdigest(),
        "remote_name": "mesh/x.glb",
        "details": dict(mesh.media.details),
    }
    await folder.abandon()
    assert len(names(folder.path)) == 4


@posix
@pytest.mark.threat("S13")
async def test_results_are_private(folder: DiskJobFolder) -> None:
    note = folder.partial()
    size, digest = await folder.write_text(note, "x")
    await folder.commit([ResultFile(note, "1", await folder.inspect(note), size, digest)], {})
    assert [permissions(f"{folder.path}/{name}") for name in names(folder.path)] == [0o600, 0o600]


async def test_everything_is_flushed_once_per_job_before_it_counts(settings: FileSettings, out: Path) -> None:
    disk = FailingDisk(0, 0)
    folder = await DiskResults(settings, disk=disk).open_folder(JOB, under=str(out))
    disk.calls.clear()
    await folder.commit([await fetched(folder), await fetched(folder)], {})
    assert disk.calls == ["fsync", "fsync", "fsync", "rename", "rename", "replace", "fsync_directory"]


async def test_nothing_is_flushed_when_durability_is_off(tmp_path: Path, out: Path) -> None:
    disk = FailingDisk(0, 0)
    fast = FileSettings(state_dir=str(tmp_path), durable=False)
    folder = await DiskResults(fast, disk=disk).open_folder(JOB, under=str(out))
    await folder.commit([await fetched(folder)], {})
    assert disk.calls == ["rename", "replace"]


@pytest.mark.fault(54)
@pytest.mark.fault(58)
@pytest.mark.parametrize("fails_at", range(1, 8))
@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, DiskFull), (errno.EIO, LocalError)])
async def test_whatever_call_fails_no_final_name_is_left_and_the_next_commit_succeeds(
    settings: FileSettings, out: Path, fails_at: int, code: int, error: type[LocalError]
) -> None:
    opened = await DiskResults(settings).open_folder(JOB, under=str(out))
    folder = DiskJobFolder(opened.path, settings=settings, disk=FailingDisk(fails_at, code))
    files = [await fetched(folder, file_name="flux.png"), await fetched(folder, samples.glb(), "12")]
    before = names(folder.path)

    with pytest.raises(error) as caught:
        await folder.commit(files, {})

    assert names(folder.path) == before
    assert all(name.startswith(".partial-") for name in before)
    assert caught.value.hint
    outputs = await folder.commit(files, {})
    assert all(sha256(output.path) == output.sha256 for output in outputs)
    assert names(folder.path) == ["12-1.glb", "flux.png", "manifest.json"]


async def test_a_failed_commit_can_be_abandoned_without_a_trace(settings: FileSettings, out: Path) -> None:
    opened = await DiskResults(settings).open_folder(JOB, under=str(out))
    folder = DiskJobFolder(opened.path, settings=settings, disk=FailingDisk(4, errno.ENOSPC))
    files = [await fetched(folder), await fetched(folder)]
    with pytest.raises(DiskFull):
        await folder.commit(files, {})
    await folder.abandon()
    await folder.abandon()
    assert names(out) == []


async def test_a_file_that_changed_after_its_download_is_not_a_result(folder: DiskJobFolder) -> None:
    file, other = await fetched(folder), await fetched(folder)
    overwrite(file.partial, PNG[:-30] + bytes([PNG[-30] ^ 1]) + PNG[-29:])
    with pytest.raises(OutputCorrupt, match="changed on this disk"):
        await folder.commit([other, file], {})
    assert all(name.startswith(".partial-") for name in names(folder.path))


async def test_a_file_that_vanished_after_its_download_is_not_a_result(folder: DiskJobFolder) -> None:
    file = await fetched(folder)
    remove_quietly(file.partial)
    with pytest.raises(LocalError):
        await folder.commit([file], {})
    assert names(folder.path) == []


class WaitingDisk(Disk):
    """A disk that takes as long as the test wants."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def replace(self, source: str, target: str) -> None:
        self.reached.set()
        assert self.go_on.wait(30)
        super().replace(source, target)


async def test_a_commit_that_is_cancelled_takes_everything_back(settings: FileSettings, out: Path) -> None:
    """Invariant I17: after a cancellation is acknowledged no result is committed."""
    disk = WaitingDisk()
    folder = await DiskResults(settings, disk=disk).open_folder(JOB, under=str(out))
    files = [await fetched(folder)]
    committing = asyncio.create_task(folder.commit(files, {}))
    await asyncio.to_thread(disk.reached.wait)
    committing.cancel()
    await asyncio.sleep(0)
    committing.cancel()
    disk.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await committing
    assert all(name.startswith(".partial-") for name in names(folder.path))
    await folder.abandon()
    assert names(out) == []


@posix
@pytest.mark.fault(54)
@pytest.mark.processes
@pytest.mark.parametrize("limit", [100, 700])
def test_when_the_disk_really_is_full(tmp_path: Path, limit: int) -> None:
    """The limit on file size fails in the middle of a write, in the text or in the manifest, even for root."""
    script = textwrap.dedent(
        """
        import asyncio, resource, sys
        from runcomfy.adapters.results import DiskResults
        from runcomfy.domain.exceptions import DiskFull
        from runcomfy.domain.settings import FileSettings
        from runcomfy.ports.results import ResultFile

        async def main(out, limit):
            folder = await DiskResults(FileSettings(state_dir=out)).open_folder("job-1", under=out)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            try:
                note = folder.partial()
                size, digest = await folder.write_text(note, "x" * 500)
                file = ResultFile(note, "1", await folder.inspect(note), size, digest, file_name="note.txt")
                await folder.commit([file], {"notes": "y" * 5000})
            except DiskFull as error:
                print(error.code)
            await folder.abandon()

        asyncio.run(main(sys.argv[1], int(sys.argv[2])))
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "disk-full\n"
    assert names(tmp_path) == []


# --- text ---


async def test_text_is_kept_as_it_came(folder: DiskJobFolder) -> None:
    for text in ("", "a\r\nb\n", samples.HTML.decode(), "\ud800"):
        partial = folder.partial()
        size, digest = await folder.write_text(partial, text)
        assert content(partial) == text.encode("utf-8", "replace")
        assert (size, digest) == (len(text.encode("utf-8", "replace")), sha256(partial))
        assert (await folder.inspect(partial, expected=OutputKind.TEXT)).kind is OutputKind.TEXT


# --- converting ---


def opened(output: Output | ResultFile) -> Image.Image:
    path = output.path if isinstance(output, Output) else output.partial
    return Image.open(io.BytesIO(Path(path).read_bytes()))


@pytest.mark.parametrize(("to", "form"), [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")])
@pytest.mark.parametrize("source", ["PNG", "JPEG", "WEBP", "GIF"])
async def test_pictures_are_converted_and_verified_anew(folder: DiskJobFolder, to: str, form: str, source: str) -> None:
    file = await fetched(folder, samples.picture(source), file_name="flux.png")
    converted = await folder.convert(file, to)
    (output,) = await folder.commit([converted], {})
    assert Path(output.path).name == f"flux.{to}"
    assert (opened(output).format, opened(output).size) == (form, (64, 48))
    assert (output.size_bytes, output.sha256) == (len(content(output.path)), sha256(output.path))
    assert names(folder.path) == [f"flux.{to}", "manifest.json"]
    assert (converted is file) == (form == source)


async def test_transparency_becomes_white_where_there_is_none(folder: DiskJobFolder) -> None:
    for mode, clear in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0))):
        out = io.BytesIO()
        Image.new(mode, (16, 16), clear).save(out, "PNG")
        assert opened(await folder.convert(await fetched(folder, out.getvalue()), "jpg")).getpixel((8, 8)) == (255,) * 3
    out = io.BytesIO()
    indexed = Image.new("P", (16, 16), 3)
    indexed.putpalette([50] * 768)
    indexed.save(out, "PNG", transparency=3)
    assert opened(await folder.convert(await fetched(folder, out.getvalue()), "jpg")).getpixel((8, 8)) == (255,) * 3


async def test_sixteen_bits_are_scaled_and_not_clipped(folder: DiskJobFolder) -> None:
    out = io.BytesIO()
    Image.new("I;16", (16, 16), 32_896).save(out, "PNG")
    assert opened(await folder.convert(await fetched(folder, out.getvalue()), "jpg")).getpixel((8, 8)) == 128


async def test_an_animation_stays_one_in_webp_and_its_profile_goes_along(folder: DiskJobFolder) -> None:
    moving = await folder.convert(await fetched(folder, samples.picture("GIF", frames=3)), "webp")
    assert moving.media.details["frames"] == 3
    profiled = samples.picture("PNG", icc_profile=b"a colour profile")
    assert (
        opened(await folder.convert(await fetched(folder, profiled), "webp")).info["icc_profile"] == b"a colour profile"
    )


async def test_other_kinds_are_left_alone_and_other_formats_refused(folder: DiskJobFolder) -> None:
    mesh = await fetched(folder, samples.glb())
    assert await folder.convert(mesh, "jpg") is mesh
    with pytest.raises(ValueInvalid, match="tiff"):
        await folder.convert(mesh, "tiff")


async def test_a_picture_that_the_format_cannot_hold_is_said_and_kept(folder: DiskJobFolder) -> None:
    wide = await fetched(folder, samples.png(20_000, 1))
    with pytest.raises(OutputCorrupt, match="could not be converted to webp"):
        await folder.convert(wide, "webp")
    (output,) = await folder.commit([wide], {})
    assert output.kind is OutputKind.IMAGE
    assert names(folder.path) == ["9-1.png", "manifest.json"]


# --- inputs ---


async def test_inputs_are_checked_by_what_they_are_for(results: DiskResults, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.glb").write_bytes(samples.glb())
    await results.check_input(str(tmp_path / "a.png"), kind="image")
    await results.check_input(str(tmp_path / "a.glb"), kind="mesh")
    with pytest.raises(InputFileInvalid, match="GLB mesh"):
        await results.check_input(str(tmp_path / "a.glb"), kind="image")
    with pytest.raises(InputFileMissing):
        await results.check_input(str(tmp_path / "gone"), kind="mesh")
