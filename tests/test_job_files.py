"""Job files on this computer: what is found, what is read, what is said of what is wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

import workflows
from runcomfy.adapters.job_files import DEEPEST, FOLDERS, YamlJobFiles
from runcomfy.adapters.workflow_registry import WorkflowRegistry
from runcomfy.adapters.yaml_text import MAX_BYTES, read_yaml
from runcomfy.domain.exceptions import FolderWatched, InputFileMissing, JobFileInvalid
from runcomfy.domain.job import JobRequest
from runcomfy.domain.job_file import FIELDS, read_job_file
from runcomfy.domain.queued import NewJob
from runcomfy.domain.secret import Secret
from runcomfy.domain.settings import QueueSettings

GUIDE = """\
job_type: T2I
workflow_id: wf_realistic_portrait
priority: 20
inputs:
  prompt: "Ultra-realistic portrait of a medieval knight in rain, cinematic lighting"
  seed: 123456
  steps: 30
outputs:
  file_path: "jobs/finished/image/T2I_20250809123001_1_knight.png"
metadata:
  creator: "cli"
  version: "1.0"
"""
NAME = "T2I_20250809123001_1_knight.yaml"


def settings(root: Path) -> QueueSettings:
    return QueueSettings(
        root=str(root),
        jobs_processing=str(root / "jobs" / "processing"),
        jobs_finished=str(root / "jobs" / "finished"),
        database=Secret(str(root / "queue.sqlite3")),
    )


def job_files(root: Path) -> YamlJobFiles:
    return YamlJobFiles(
        settings(root), registry=WorkflowRegistry(root=str(root), workflows_file=None, shipped=workflows.names)
    )


def dropped(root: Path, text: str | bytes, name: str = NAME) -> Path:
    path = root / "jobs" / "processing" / "image" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(root: Path, text: str | bytes) -> NewJob:
    files = job_files(root)
    found = files.find(str(dropped(root, text)))
    data = files.read(found)
    assert isinstance(data, bytes)
    return files.job(found, data).job


def refused(root: Path, text: str | bytes) -> JobFileInvalid:
    with pytest.raises(JobFileInvalid) as caught:
        read(root, text)
    return caught.value


# --- what is read ---------------------------------------------------------------------------------------------


def test_the_guides_job_becomes_a_job_of_the_queue(tmp_path: Path) -> None:
    job = read(tmp_path, GUIDE)
    finished = tmp_path / "jobs" / "finished"
    assert job == NewJob(
        request=JobRequest(
            "wf_realistic_portrait",
            inputs={
                "prompt": "Ultra-realistic portrait of a medieval knight in rain, cinematic lighting",
                "seed": 123456,
                "steps": 30,
            },
            out_file=str(finished / "image" / "T2I_20250809123001_1_knight.png"),
            out_root=str(finished),
        ),
        workflow_id="wf_realistic_portrait",
        config_name=NAME,
        job_type="T2I",
        priority=20,
        metadata={"creator": "cli", "version": "1.0"},
        source_path=str(tmp_path / "jobs" / "processing" / "image" / NAME),
        content_sha256=job.content_sha256,
    )
    assert len(job.content_sha256) == 64


def test_every_field_has_its_place(tmp_path: Path) -> None:
    job = read(tmp_path, GUIDE + "retry_limit: 5\ntimeout: 90s\nuser: ada\nproject: knights\n")
    assert (job.retry_limit, job.request.timeout, job.user, job.project) == (5, timedelta(seconds=90), "ada", "knights")


def test_what_the_file_leaves_open_is_left_to_the_queue(tmp_path: Path) -> None:
    text = 'job_type: 3D\nworkflow_id: image_invert\ninputs: {}\noutputs: {file_path: "jobs/finished/3d/a.glb"}\n'
    job = read(tmp_path, text)
    assert (job.priority, job.retry_limit, job.request.timeout, job.request.inputs) == (None, None, None, {})
    assert job.job_type == "3D"


INPUTS = [
    ("prompt: 42", "42"),
    ("prompt: 007", "007"),
    ("prompt: no", "no"),
    ("31_text: on", "on"),
    ("seed: '123'", "123"),
    ("seed: 0123", 123),
    ("seed: 18446744073709551615", 18446744073709551615),
    ("cfg: 1e1", 10.0),
    ("cfg: .5", 0.5),
    ("mask: 0x1F", 31),
    ("tiled: true", True),
    ("tiled: False", False),
    ("vae: null", None),
    ("vae: ~", None),
    ("day: 2025-08-09", "2025-08-09"),
    ("at: 2025-08-09T10:00:00Z", "2025-08-09T10:00:00Z"),
    ("ratio: 16:9", "16:9"),
    ("word: 1_000", "1_000"),
    ("word: nan", "nan"),
    ("sizes: [512, 768.5, a, true]", [512, 768.5, "a", True]),
    ("deep: {a: {b: [1]}}", {"a": {"b": [1]}}),
    ("text: |\n    two\n    lines", "two\nlines\n"),
    ('empty: ""', ""),
]


@pytest.mark.parametrize(("line", "meant"), INPUTS)
def test_inputs_mean_what_people_who_never_read_the_yaml_standard_expect(tmp_path: Path, line: str, meant: Any) -> None:
    text = GUIDE.replace("  steps: 30", f"  x_steps: 30\n  {line}").replace('  prompt: "U', '  other: "U')
    text = text.replace("  seed: 123456\n", "")
    value = read(tmp_path, text).request.inputs[line.partition(":")[0]]
    assert value == meant
    assert type(value) is type(meant)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    job = read(tmp_path, b"\xef\xbb\xbf" + GUIDE.replace("\n", "\r\n").encode())
    assert job.request.inputs == read(tmp_path, GUIDE).request.inputs


def test_input_files_of_the_project_are_made_absolute_and_nothing_else(tmp_path: Path) -> None:
    for name in ("in.png", "prompt.txt", "model.safetensors"):
        (tmp_path / name).write_text("x")
    (tmp_path.parent / "outside.png").write_text("x")
    inputs = "\n".join(
        f"  {name}: '{value}'"
        for name, value in {
            "image": "in.png",
            "at": "@prompt.txt",
            "words": "prompt.txt",
            "model": "model.safetensors",
            "gone": "none.png",
            "out": "../outside.png",
            "escaped": "@@in.png",
        }.items()
    )
    found = read(tmp_path, GUIDE.replace("  steps: 30", inputs + "\n  many: [in.png]")).request.inputs
    assert found["image"] == str(tmp_path / "in.png")
    assert found["at"] == f"@{tmp_path / 'prompt.txt'}"
    assert found["many"] == [str(tmp_path / "in.png")]
    assert [found[name] for name in ("words", "model", "gone", "out", "escaped")] == [
        "prompt.txt",
        "model.safetensors",
        "none.png",
        "../outside.png",
        "@@in.png",
    ]


# --- what is refused ------------------------------------------------------------------------------------------

MISTAKES = [
    ("job_type: T2I", "job_typ: T2I", "line 1, job_typ: there is no such field", "did you mean job_type?"),
    ("job_type: T2I\n", "", "line 1, job_type: it is missing", "job_type: T2I"),
    ("job_type: T2I", "job_type: [T2I]", "line 1, job_type: expected a text, found a list", "quotes"),
    ("workflow_id: wf_realistic_portrait", "workflow_id: true", "line 2, workflow_id: expected a text", '"true"'),
    ("wf_realistic_portrait", "wf_realistic_potrait", "line 2, workflow_id: there is no workflow", "did you mean"),
    ("priority: 20", "priority: 0", "line 3, priority: expected a whole number from 1 to 999, found 0", "such as 50"),
    ("priority: 20", 'priority: "20"', "line 3, priority: expected a whole number", "without quotes"),
    ("priority: 20", "priority: 2.5", "line 3, priority: expected a whole number", ""),
    ("priority: 20", "priority: true", "line 3, priority: expected a whole number", ""),
    ("inputs:", "inputs: 3\nignored:", "line 4, inputs: expected names with values, found 3", "{}"),
    ("  seed: 123456", "  seed: .nan", "line 6, inputs.seed: .nan is not a finite number", "finite"),
    ("  seed: 123456", "  seed: -.inf", "line 6, inputs.seed: -.inf is not a finite number", ""),
    ("  seed: 123456", "  seed: 1e999", "line 6, inputs.seed: 1e999 is too large", ""),
    ("  seed: 123456", f"  seed: {'9' * 5000}", "line 6, inputs.seed: a number of 5000 characters is too long", ""),
    ("  seed: 123456", "  seed:", "line 6, inputs.seed: there is no value", "null"),
    ("  seed: 123456", "  hires: yes", "line 6, inputs.hires: yes may mean a switch or a text", "write true or false"),
    ("  seed: 123456", "  sizes: [1, No]", "line 6, inputs.sizes[1]: No may mean a switch or a text", ""),
    ("  seed: 123456", "  sizes:\n    wide: No", "line 7, inputs.sizes.wide: No may mean a switch or a text", ""),
    ("  seed: 123456", "  sizes: [1, .inf]", "line 6, inputs.sizes[1]: .inf is not a finite number", ""),
    ("  seed: 123456", "  negative_prompt: False", "inputs.negative_prompt: expected a text, found False", '"False"'),
    ("  seed: 123456", "  prompt: x", "line 6, inputs.prompt: it is there twice; first on line 5", "keep one"),
    (
        "  seed: 123456",
        "  negative_prompt: true",
        "line 6, inputs.negative_prompt: expected a text, found true",
        '"true"',
    ),
    ("  seed: 123456", "  seed: &a 1", "line 6, inputs.seed: &a names a place", ""),
    ("  seed: 123456", "  seed: *a", "line 6, inputs.seed: *a points to another place", "quotes"),
    ("  seed: 123456", "  seed: !!int 5", "line 6, inputs.seed: a tag (tag:yaml.org,2002:int) is not taken", ""),
    ("  seed: 123456", "  seed: !!python/object/apply:os.system [x]", "line 6, inputs.seed: a tag", ""),
    ("  seed: 123456", "  seed: " + "[" * 30 + "]" * 30, "this is nested more than 24 deep", "flatter"),
    ("  seed: 123456", '  seed: "a\\0b"', "line 6, inputs.seed: there is a control character (U+0000)", ""),
    ("  seed: 123456", '  seed: "\\e[31m"', "line 6, inputs.seed: there is a control character (U+001B)", ""),
    ("  seed: 123456", "  ? [a]\n  : b", "a list or a mapping is used as a name", ""),
    ("  seed: 123456", "  seed: knight: rain", "line 6, inputs.seed: this is not YAML", "quotes"),
    ('lighting"', "lighting", "line 5, inputs.prompt: this is not YAML: the text in quotes", "is a quote missing?"),
    ("outputs:\n", "output:\n", "line 8, output: there is no such field", "did you mean outputs?"),
    ("  file_path", "  filepath", "line 9, outputs.filepath: there is no such field", "file_path"),
    ("outputs:\n  file_path", "outputs:\n  x", "line 9, outputs.x: there is no such field", ""),
    ("jobs/finished/image", "../finished", "line 9, outputs.file_path: ", ""),
    ("metadata:\n", "metadata:\n  size: .inf\n", "line 11, metadata.size: .inf is not a finite number", ""),
    ("job_type: T2I", 'job_type: "T2I\\nx"', "line 1, job_type: it is longer than a line of", "one word"),
    ("metadata:\n", "metadata: x\n#", "line 12, metadata.version: this is not YAML", ""),
    ('metadata:\n  creator: "cli"\n  version: "1.0"', "metadata: x", "line 10, metadata: expected names with", "leave"),
    ("metadata:", "retry_limit: 101\nmetadata:", "line 10, retry_limit: expected a whole number from 0 to 100", ""),
    ("metadata:", "timeout: soon\nmetadata:", "line 10, timeout: 'soon' is not a duration", "10m"),
    ("metadata:", "timeout: 0\nmetadata:", "line 10, timeout: it is not more than nothing", ""),
    ("metadata:", "---\nmetadata:", "line 10: a second document begins here", "one file for each"),
    ("job_type: T2I", f"job_type: {'x' * 300}", "line 1, job_type: it is longer than a line of", "one word"),
    ("job_type: T2I", 'job_type: " "', "line 1, job_type: it is empty", "after the colon"),
    ("metadata:", "timeout: [1]\nmetadata:", "line 10, timeout: expected a text, found a list", ""),
    ("  seed: 123456", "  negative_prompt: [a]", "line 6, inputs.negative_prompt: expected a text, found a list", ""),
    ("jobs/finished/image", "jobs/finished/" + "x" * 5000, "line 9, outputs.file_path: it has more than", ""),
]


@pytest.mark.parametrize(("there", "instead", "words", "hint"), MISTAKES)
@pytest.mark.threat("S17")
def test_a_mistake_is_told_with_file_line_and_field(
    tmp_path: Path, there: str, instead: str, words: str, hint: str
) -> None:
    assert there in GUIDE
    error = refused(tmp_path, GUIDE.replace(there, instead, 1))
    assert error.message.startswith(f"{NAME}, line ")
    assert words in error.message
    assert hint in error.hint
    assert "\x1b" not in error.message
    first = error.details["problems"][0]
    assert error.details["line"] == first["line"]
    assert error.details["field"] == first["field"]


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    error = refused(tmp_path, "job_type: T2I\npriority: high\ninputs:\n  hires: on\n  seed: .inf\noutputs: {}\n")
    assert [(problem["line"], problem["field"]) for problem in error.details["problems"]] == [
        (1, "workflow_id"),
        (2, "priority"),
        (4, "inputs.hires"),
        (5, "inputs.seed"),
        (6, "outputs.file_path"),
    ]
    for problem in error.details["problems"]:
        assert problem["message"] in error.message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "line 1: the file is empty"),
        (b"# only a remark\n", "line 1: the file is empty"),
        (b"hello", "line 1: expected names with values, found hello"),
        (b"- a\n- b", "line 1: expected names with values, found a list"),
        (b"\x89PNG\r\n\x1a\n\0\0", "line 1: the text is not UTF-8"),
        (GUIDE.replace("knight in", "kn\xefght in").encode("latin-1"), "line 5: the text is not UTF-8"),
        (GUIDE.encode("utf-16"), "line 1: the text is not UTF-8"),
        (b"a: 1\nb: \x00\n", "line 2: there is a control character (U+0000)"),
        (b"a: 1\nb: \x1b[31m\n", "line 2: there is a control character (U+001B)"),
        (b"a: " + b"x" * MAX_BYTES, "the file has more than 1024 KiB"),
        (b"a: [" + b"1," * 60_000 + b"1]", "there are more than 50000 values"),
        (b"x" * 300 + b": 1", "a name has more than 200 characters"),
        (b"? ''\n: 1", "a name is empty"),
        (b"a: 1\n\tb: 2", "this is not YAML"),
    ],
)
def test_what_is_no_job_file_at_all_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    assert words in refused(tmp_path, data).message


LAUGHS = b"".join(
    [b"a0: &a0 [x,x,x,x,x,x,x,x,x]\n"]
    + [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n".encode() for n in range(1, 12)]
)


def test_a_billion_laughs_are_not_begun(tmp_path: Path) -> None:
    assert "&a0 names a place" in refused(tmp_path, LAUGHS).message


LINES = st.sampled_from(
    [*GUIDE.splitlines(), "- a", "  - {b: [", "x: &a", "y: *a", "? k", ": v", "--- ", "!!python/name:os.system", '"']
)


@given(
    data=st.binary(max_size=300)
    | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.lists(LINES, max_size=15).map(lambda lines: "\n".join(lines).encode())
)
@example(b'"\\U00110000"')
@example(b'"\\ud800"')
@example(b"%YAML 9.9\n---\na: 1")
@example(b"%TAG ! x\n---\n!a b: 1")
@example(LAUGHS)
@pytest.mark.parametrize("loader", [yaml.SafeLoader, getattr(yaml, "CSafeLoader", yaml.SafeLoader)])
def test_no_bytes_make_anything_but_a_job_or_the_one_error(loader: Any, data: bytes) -> None:
    tree, problems = read_yaml(data, loader=loader)
    for problem in problems:
        assert tree is None
        assert problem.line >= 1
        assert problem.message
        assert "\x1b" not in str(problem)
    if not problems:
        with suppress(JobFileInvalid):
            read_job_file(tree, file_name="any.yaml")


@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=80))
def test_any_text_in_quotes_arrives_as_it_is(text: str) -> None:
    document = yaml.safe_dump(
        {"job_type": "T2I", "workflow_id": "w", "inputs": {"x": text}, "outputs": {"file_path": "a"}},
        default_style='"',
        allow_unicode=True,
    )
    tree, problems = read_yaml(document.encode())
    assert problems == []
    assert read_job_file(tree, file_name="x.yaml").inputs == {"x": text}


# --- the folder -----------------------------------------------------------------------------------------------


def test_the_folders_of_the_guide_are_made(tmp_path: Path) -> None:
    files = job_files(tmp_path)
    assert files.hold() == ()
    assert files.hold() == ()
    files.release()
    processing = tmp_path / "jobs" / "processing"
    assert {path.name for path in processing.iterdir() if path.is_dir()} == set(FOLDERS)
    assert (tmp_path / "jobs" / "finished").is_dir()


def test_job_files_are_found_in_every_folder_by_name_and_droppings_are_left(tmp_path: Path) -> None:
    names = ("b.yaml", "a.yml", "C.YAML", "deep/er/0.yaml")
    left = (".hidden.yaml", "x.yaml~", "x.yaml.tmp", "x.yaml.part", ".x.yaml.swp", "#x.yaml#", "~$x.yaml", "x.txt")
    for name in (*names, *left, ".git/y.yaml"):
        dropped(tmp_path, "x", "a.yml").parent.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        dropped(tmp_path, "x", name)
    (tmp_path / "jobs" / "processing" / "top.yaml").write_text("x")
    scan = job_files(tmp_path).scan()
    assert [found.name for found in scan.files] == ["0.yaml", "C.YAML", "a.yml", "b.yaml", "top.yaml"]
    assert scan.strange == ()


def test_links_are_not_followed(tmp_path: Path) -> None:
    dropped(tmp_path, GUIDE)
    outside = tmp_path / "secret.yaml"
    outside.write_text("password: x")
    folder = tmp_path / "jobs" / "processing" / "image"
    try:
        (folder / "link.yaml").symlink_to(outside)
        (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    except OSError as error:
        pytest.skip(f"no links here: {error}")
    scan = job_files(tmp_path).scan()
    assert [found.name for found in scan.files] == [NAME]
    assert sorted(Path(each.path).name for each in scan.strange) == ["link.yaml", "up"]
    assert {each.why for each in scan.strange} == {"it is a link"}


def test_what_is_no_file_or_lies_very_deep_is_not_taken(tmp_path: Path) -> None:
    dropped(tmp_path, GUIDE)
    processing = tmp_path / "jobs" / "processing"
    deepest = processing.joinpath(*(["d"] * DEEPEST))
    deepest.mkdir(parents=True)
    (deepest / "deep.yaml").write_text(GUIDE)
    (deepest / "deeper").mkdir()
    (deepest / "deeper" / "lost.yaml").write_text(GUIDE)
    if hasattr(os, "mkfifo"):
        os.mkfifo(processing / "pipe.yaml")
        (processing / "notes").symlink_to(tmp_path / "jobs" / "nothing-there")  # nothing that anybody would wait for
    scan = job_files(tmp_path).scan()
    assert sorted(found.name for found in scan.files) == sorted([NAME, "deep.yaml"])
    (strange,) = scan.strange
    assert strange.path == str(deepest / "deeper")
    assert strange.why == f"it is more than {DEEPEST} folders deep"


def test_a_file_that_became_a_link_after_it_was_found_is_not_read(tmp_path: Path) -> None:
    path = dropped(tmp_path, GUIDE)
    files = job_files(tmp_path)
    (found,) = files.scan().files
    outside = tmp_path / "outside.yaml"
    path.rename(outside)
    try:
        path.symlink_to(outside)
    except OSError as error:
        pytest.skip(f"no links here: {error}")
    assert isinstance(files.read(found), JobFileInvalid)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the file system takes texts only")
def test_a_name_that_is_no_text_is_told(tmp_path: Path) -> None:
    folder = dropped(tmp_path, GUIDE).parent
    for name in (b"\xff.yaml", b"a\nb.yaml", b"\x1b[31m.yaml"):
        (folder / os.fsdecode(name)).write_text(GUIDE)
    scan = job_files(tmp_path).scan()
    assert [found.name for found in scan.files] == [NAME]
    assert len(scan.strange) == 3


def test_a_file_that_changes_while_it_is_read_is_not_taken(tmp_path: Path) -> None:
    path = dropped(tmp_path, GUIDE)
    files = job_files(tmp_path)
    (found,) = files.scan().files
    assert isinstance(files.read(found), bytes)
    path.write_text(GUIDE + "# more\n")
    assert files.read(found) is None
    path.unlink()
    assert files.read(found) is None


def test_a_file_anywhere_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text(GUIDE)
    monkeypatch.chdir(tmp_path)
    found = job_files(tmp_path).find("mine.yaml")
    assert (found.path, found.name) == (str(tmp_path / "mine.yaml"), "mine.yaml")
    for name in ("none.yaml", "jobs", "a\0b"):
        with pytest.raises(InputFileMissing):
            job_files(tmp_path).find(name)


# --- one monitor ----------------------------------------------------------------------------------------------


@pytest.mark.fault(63)
def test_a_second_monitor_is_told_who_the_first_is(tmp_path: Path) -> None:
    first, second = job_files(tmp_path), job_files(tmp_path)
    first.hold()
    with pytest.raises(FolderWatched) as caught:
        second.hold()
    assert f"process {os.getpid()} on {socket.gethostname()}" in caught.value.message
    assert "comfyctl agent execute" in caught.value.hint
    assert caught.value.details["pid"] == os.getpid()
    first.release()
    first.release()
    second.hold()
    second.release()


@pytest.mark.fault(63)
def test_a_folder_that_was_removed_is_made_and_held_again(tmp_path: Path) -> None:
    import shutil

    first, second = job_files(tmp_path), job_files(tmp_path)
    first.hold()
    shutil.rmtree(tmp_path / "jobs")
    first.hold()
    with pytest.raises(FolderWatched):
        second.hold()
    first.release()


@pytest.mark.processes
@pytest.mark.fault(63)
def test_a_killed_monitor_frees_its_folder(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from runcomfy.adapters.folder_lock import FolderLock\n"
        "FolderLock(Path(sys.argv[1])).take(); print('held', flush=True); time.sleep(60)"
    )
    files = job_files(tmp_path)
    files.hold()
    files.release()
    folder = str(tmp_path / "jobs" / "processing")
    with subprocess.Popen([sys.executable, "-c", program, folder], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"held"
        with pytest.raises(FolderWatched) as caught:
            files.hold()
        assert caught.value.details["pid"] == process.pid
        process.kill()
        process.wait()
    files.hold()
    files.release()


# --- the page -------------------------------------------------------------------------------------------------


def test_the_page_about_job_files_shows_a_job_and_a_list_that_are_read_and_names_every_field(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "howto" / "job-files.md").read_text(encoding="utf-8")
    job, listed = (block.partition("```")[0] for block in page.split("```yaml\n")[1:])
    assert read(tmp_path, job).priority == 20
    (tmp_path / "workflows.yaml").write_text(listed)
    registry = WorkflowRegistry(
        root=str(tmp_path), workflows_file=str(tmp_path / "workflows.yaml"), shipped=workflows.names
    )
    assert registry.resolve("wf_realistic_portrait").input_names == {"prompt": "6.text"}
    table = page.partition("| field |")[2].partition("\n\n")[0]
    for name in FIELDS:
        assert f"`{name}" in table, name
    assert refused(tmp_path, GUIDE.replace("seed: 123456", "x: 1\n  seed: .nan")).message in page.replace(
        "T2I_x.yaml", NAME
    )
