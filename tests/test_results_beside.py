"""Results at the path a job file names: nothing of anybody's is lost, nothing is written elsewhere."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from runcomfy.adapters.files import Disk
from runcomfy.adapters.job_folder import DiskJobFolder
from runcomfy.adapters.results import DiskResults
from runcomfy.domain.exceptions import DiskFull, LeaseLost, LocalError, OutputCorrupt, ValueInvalid
from runcomfy.domain.job import JobId, Output
from runcomfy.domain.settings import FileSettings
from runcomfy.ports.results import ResultFile
from runcomfy.testing import samples

posix = pytest.mark.skipif(os.name == "nt", reason="permissions and links as on POSIX")
JOB = JobId("job-1")
PNG, OTHER = samples.png(), samples.png(9, 9)


class FailingDisk(Disk):
    """A disk whose n-th rename or flush of names fails, once."""

    def __init__(self, fails_at: int) -> None:
        self.calls: list[str] = []
        self._fails_at = fails_at

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) == self._fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def rename(self, source: str, target: str) -> None:
        self._call("rename")
        super().rename(source, target)

    def fsync_directory(self, path: str) -> None:
        super().fsync_directory(path)
        self._call("fsync_directory")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    return tmp_path / "jobs" / "finished"


@pytest.fixture
def settings(tmp_path: Path) -> FileSettings:
    return FileSettings(state_dir=str(tmp_path / "state"))


@pytest.fixture
def results(settings: FileSettings) -> DiskResults:
    return DiskResults(settings)


async def opened(
    results: DiskResults, finished: Path, name: str = "image/knight.png", **options: object
) -> DiskJobFolder:
    earlier: dict[str, str] = dict(options.get("earlier", {}))  # type: ignore[call-overload]
    job = JobId(str(options.get("job", JOB)))
    return await results.open_beside(job, file=str(finished / name), root=str(finished), earlier=earlier)


async def fetched(folder: DiskJobFolder, content: bytes = PNG, *, name: str = "", passing: bool = False) -> ResultFile:
    partial = folder.partial()
    write(partial, content)
    media = await folder.inspect(partial)
    digest = hashlib.sha256(content).hexdigest()
    return ResultFile(partial, "9", media, len(content), digest, name=name, passing=passing)


def write(path: str | Path, content: bytes) -> None:
    Path(path).write_bytes(content)


def content(path: str | Path) -> bytes:
    return Path(path).read_bytes()


def make(folder: Path) -> None:
    folder.mkdir(parents=True)


def link(path: Path, target: Path) -> None:
    path.symlink_to(target)


def names(folder: Path | str) -> list[str]:
    return sorted(entry.name for entry in Path(folder).iterdir())


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def base(outputs: tuple[Output, ...]) -> list[str]:
    return [Path(output.path).name for output in outputs]


async def test_one_result_has_exactly_the_path_that_was_written(results: DiskResults, finished: Path) -> None:
    folder = await opened(results, finished)
    assert folder.path == str(finished / "image")
    outputs = await folder.commit([await fetched(folder)], {"job_id": JOB})
    assert [output.path for output in outputs] == [str(finished / "image" / "knight.png")]
    assert content(outputs[0].path) == PNG
    assert hashlib.sha256(PNG).hexdigest() == outputs[0].sha256
    assert names(finished / "image") == ["knight.png"]
    assert folder.notes == ()


@posix
async def test_the_users_folders_and_files_have_the_users_permissions(results: DiskResults, finished: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = await opened(results, finished)
        waiting = finished / "image" / ".work-job-1"
        assert waiting.stat().st_mode & 0o777 == 0o700
        (output,) = await folder.commit([await fetched(folder)], {})
    finally:
        os.umask(before)
    assert (finished / "image").stat().st_mode & 0o777 == 0o750
    assert os.stat(output.path).st_mode & 0o777 == 0o640  # noqa: PTH116


@pytest.mark.parametrize(
    ("name", "kind", "found"),
    [
        ("k.png", "WEBP", "PNG"), ("k.jpg", "PNG", "JPEG"), ("k.jpeg", "PNG", "JPEG"), ("k.webp", "PNG", "WEBP"),
        ("k.png", "GIF", "PNG"), ("k.jpg", "JPEG", "JPEG"),
    ],
)  # fmt: skip
async def test_a_picture_is_converted_to_what_its_name_says(
    results: DiskResults, finished: Path, name: str, kind: str, found: str
) -> None:
    folder = await opened(results, finished, name)
    (output,) = await folder.commit([await fetched(folder, samples.picture(kind))], {})
    assert base((output,)) == [name]
    with Image.open(output.path) as picture:
        assert picture.format == found
    assert hashlib.sha256(content(output.path)).hexdigest() == output.sha256


async def test_what_its_name_cannot_hold_keeps_the_stem_and_says_what_it_is(
    results: DiskResults, finished: Path
) -> None:
    for name, what, made in [
        ("k.png", samples.glb(), "k.glb"),
        ("k.webp", samples.png(20_000, 1), "k.png"),
        ("m.png", samples.picture("GIF", frames=3), "m.gif"),
        ("n", PNG, "n.png"),
    ]:
        folder = await opened(results, finished, name)
        assert base(await folder.commit([await fetched(folder, what)], {})) == [made]
        assert any(name in note and made in note for note in folder.notes)


async def test_several_results_are_numbered_around_the_one_that_was_meant(results: DiskResults, finished: Path) -> None:
    folder = await opened(results, finished, "k.png")
    files = [await fetched(folder, samples.glb()), await fetched(folder), await fetched(folder, OTHER, passing=True)]
    assert base(await folder.commit(files, {})) == ["k_2.glb", "k.png", "k_3.png"]
    assert names(finished) == ["k.png", "k_2.glb", "k_3.png"]


# --- what is there already --------------------------------------------------------------------------------


async def test_what_is_in_the_way_stays_and_the_result_gets_the_next_number(
    results: DiskResults, finished: Path
) -> None:
    """Another job's row may name it, with its hash (I15)."""
    make(finished)
    write(finished / "k.png", b"another job's")
    write(finished / "k_1.png", b"a third one's")
    folder = await opened(results, finished, "k.png")
    outputs = await folder.commit([await fetched(folder)], {})
    assert base(outputs) == ["k_2.png"]
    assert tree(finished) == {"k.png": b"another job's", "k_1.png": b"a third one's", "k_2.png": PNG}
    assert folder.notes == ("k.png was there already, from elsewhere; the result is k_2.png",)


async def test_of_two_jobs_that_want_one_name_the_slower_one_chooses_anew(results: DiskResults, finished: Path) -> None:
    slow = await opened(results, finished, "k.png", job="slow")
    quick = await opened(results, finished, "k.png", job="quick")
    picture, other = await fetched(slow), await fetched(quick, OTHER)

    async def after_the_quick_one(publish: Callable[[], None], _: tuple[Output, ...]) -> None:
        if not (finished / "k.png").exists():
            await quick.commit([other], {})
        await asyncio.to_thread(publish)

    assert base(await slow.commit([picture], {}, through=after_the_quick_one)) == ["k_1.png"]
    assert tree(finished) == {"k.png": OTHER, "k_1.png": PNG}
    assert slow.notes == ("k.png was there already, from elsewhere; the result is k_1.png",)


async def test_the_jobs_own_earlier_output_is_replaced_unless_somebody_changed_it(
    results: DiskResults, finished: Path
) -> None:
    make(finished)
    write(finished / "k.png", OTHER)
    earlier = {str(finished / "k.png"): hashlib.sha256(OTHER).hexdigest()}
    folder = await opened(results, finished, "k.png", earlier=earlier)
    await folder.commit([await fetched(folder)], {})
    assert tree(finished) == {"k.png": PNG}
    assert folder.notes == ()

    write(finished / "k.png", b"touched up by hand")
    folder = await opened(results, finished, "k.png", earlier=earlier)
    await folder.commit([await fetched(folder)], {})
    assert tree(finished) == {"k.png": b"touched up by hand", "k_1.png": PNG}


async def test_the_same_content_is_not_kept_twice(results: DiskResults, finished: Path) -> None:
    """A worker was killed between giving the name and the record of it; the next one delivers the same bytes."""
    for _ in range(3):
        folder = await opened(results, finished, "k.png")
        await folder.commit([await fetched(folder)], {})
    assert tree(finished) == {"k.png": PNG}


@posix
@pytest.mark.threat("S1")
async def test_a_link_in_the_way_is_left_and_not_followed(results: DiskResults, finished: Path) -> None:
    make(finished)
    write(finished.parent / "mine.png", b"mine")
    (finished / "k.png").symlink_to(finished.parent / "mine.png")
    folder = await opened(results, finished, "k.png")
    await folder.commit([await fetched(folder)], {})
    assert content(finished.parent / "mine.png") == b"mine"
    assert (finished / "k.png").is_symlink()
    assert content(finished / "k_1.png") == PNG


# --- all or nothing ---------------------------------------------------------------------------------------


@pytest.mark.fault(54)
@pytest.mark.fault(58)
@pytest.mark.parametrize("fails_at", range(1, 5))
async def test_whatever_fails_everything_is_as_it_was(settings: FileSettings, finished: Path, fails_at: int) -> None:
    make(finished)
    write(finished / "k.png", b"somebody's")
    write(finished / "k_2.glb", samples.glb())
    disk = FailingDisk(fails_at)
    folder = await opened(DiskResults(settings, disk=disk), finished, "k.png")
    files = [await fetched(folder), await fetched(folder, samples.glb())]
    with pytest.raises(DiskFull):
        await folder.commit(files, {})
    assert {name: what for name, what in tree(finished).items() if not name.startswith(".work")} == {
        "k.png": b"somebody's",
        "k_2.glb": samples.glb(),
    }
    assert base(await folder.commit(files, {})) == ["k_1.png", "k_2.glb"]
    assert names(finished) == ["k.png", "k_1.png", "k_2.glb"]
    assert disk.calls[-4:] == ["rename", "rename", "rename", "fsync_directory"]


async def test_names_are_durable_before_the_record_of_them_and_taken_back_without_it(
    settings: FileSettings, finished: Path
) -> None:
    disk = FailingDisk(0)
    folder = await opened(DiskResults(settings, disk=disk), finished, "k.png")
    file = await fetched(folder)
    seen: list[list[str]] = []

    async def refuses(publish: Callable[[], None], outputs: tuple[Output, ...]) -> None:
        assert base(outputs) == ["k.png"]
        assert names(finished) == [".work-job-1"]
        await asyncio.to_thread(publish)
        seen.append([*names(finished), disk.calls[-1]])
        raise LeaseLost("another worker has it")

    with pytest.raises(LeaseLost):
        await folder.commit([file], {}, through=refuses)
    assert seen == [["k.png", "fsync_directory"]]
    assert names(finished) == [".work-job-1"]
    assert [Path(path).name for path in await folder.set_aside()] == ["k.discarded-1.png"]
    await folder.abandon()
    assert tree(finished) == {"k.discarded-1.png": PNG}


@pytest.mark.fault(61)
async def test_names_stay_if_it_is_broken_off_in_the_moment_in_which_they_may_count(
    results: DiskResults, finished: Path
) -> None:
    """A loop that ends cancels every task of it, also the one whose record the database has kept already."""
    folder = await opened(results, finished, "k.png")
    file = await fetched(folder)
    counts = asyncio.Event()

    async def kept_and_never_answered(publish: Callable[[], None], _: tuple[Output, ...]) -> None:
        await asyncio.to_thread(publish)
        counts.set()
        await asyncio.Event().wait()

    committing = asyncio.create_task(folder.commit([file], {}, through=kept_and_never_answered))
    await counts.wait()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:  # as `asyncio.run` does at its end
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await committing
    await folder.abandon()
    assert content(finished / "k.png") == PNG


async def test_names_that_another_worker_gave_meanwhile_are_not_taken_back(
    results: DiskResults, finished: Path
) -> None:
    folder = await opened(results, finished, "k.png")
    file = await fetched(folder)

    async def too_late(publish: Callable[[], None], _: tuple[Output, ...]) -> None:
        await asyncio.to_thread(publish)
        (finished / "k.png").rename(finished / "aside.png")
        write(finished / "k.png", b"the other worker's")
        raise LeaseLost("another worker has it")

    with pytest.raises(LeaseLost):
        await folder.commit([file], {}, through=too_late)
    assert content(finished / "k.png") == b"the other worker's"


async def test_a_refused_result_is_kept_beside_for_a_look_and_nothing_else_stays(
    results: DiskResults, finished: Path
) -> None:
    folder = await opened(results, finished, "k.png")
    with pytest.raises(OutputCorrupt) as caught:
        await fetched(folder, PNG[:-20])
    await folder.abandon()
    assert names(finished) == ["k.rejected-1.png"]
    assert caught.value.details["kept"] == str(finished / "k.rejected-1.png")


async def test_what_a_crash_left_is_cleared_away_and_what_it_had_moved_comes_back(
    results: DiskResults, finished: Path
) -> None:
    work = finished / ".work-job-1"
    work.mkdir(parents=True)
    write(work / ".partial-1-abc", PNG[:50])
    write(work / "old-k.png", OTHER)
    folder = await opened(results, finished, "k.png")
    assert tree(finished) == {"k.png": OTHER}
    await folder.abandon()
    assert names(finished) == ["k.png"]


# --- where nothing may go ---------------------------------------------------------------------------------


@posix
@pytest.mark.threat("S1")
async def test_a_link_that_leads_out_of_the_finished_folder_is_refused(
    results: DiskResults, finished: Path, tmp_path: Path
) -> None:
    """Threat S1."""
    make(finished)
    (tmp_path / "elsewhere").mkdir()
    (finished / "image").symlink_to(tmp_path / "elsewhere")
    (finished / "loose").symlink_to(tmp_path / "nowhere")
    for name in ("image/k.png", "image/deep/er/k.png", "loose/k.png"):
        with pytest.raises(ValueInvalid, match="a link leads out"):
            await opened(results, finished, name)
    assert names(tmp_path / "elsewhere") == []
    assert not (tmp_path / "nowhere").exists()


@posix
async def test_the_finished_folder_itself_may_be_a_link(results: DiskResults, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    make(finished.parent)
    link(finished, tmp_path / "big disk")
    folder = await opened(results, finished)
    await folder.commit([await fetched(folder)], {})
    assert content(tmp_path / "big disk" / "image" / "knight.png") == PNG


@pytest.mark.threat("S16")
async def test_a_folder_that_was_exchanged_meanwhile_gets_nothing(
    results: DiskResults, finished: Path, tmp_path: Path
) -> None:
    folder = await opened(results, finished)
    file = await fetched(folder)
    (finished / "image").rename(finished / "moved")
    (finished / "image" / ".work-job-1").mkdir(parents=True)
    write(finished / "image" / ".work-job-1" / Path(file.partial).name, PNG)
    with pytest.raises(LocalError, match="not the folder any more"):
        await folder.commit([file], {})
    assert names(finished / "image") == [".work-job-1"]


@pytest.mark.parametrize("file", ["relative.png", "\0", "image"])
async def test_what_is_no_path_of_a_file_is_refused(results: DiskResults, finished: Path, file: str) -> None:
    (finished / "image").mkdir(parents=True)
    path = file if file == "relative.png" else f"{finished}/{file}"
    with pytest.raises(ValueInvalid):
        await results.open_beside(JOB, file=path, root=str(finished))


async def test_a_file_where_a_folder_should_be_is_known_before_anything_runs(
    results: DiskResults, finished: Path
) -> None:
    make(finished)
    write(finished / "image", b"x")
    with pytest.raises(LocalError):
        await opened(results, finished)


@pytest.mark.fault(54)
async def test_a_disk_with_hardly_any_room_is_known_before_anything_runs(
    results: DiskResults, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_000_000, total=10**12))
    with pytest.raises(DiskFull, match="only 1 MB are free"):
        await opened(results, finished, "k.png")
    assert names(finished) == []
