"""`comfyctl conjure`: into a CONJURE project and out again, byte for byte, whoever interrupts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher import swap
from launcher.swap import FOLDER, TARGETS, find_project, install, status, uninstall
from runcomfy.application.faultpoints import listening
from runcomfy.cli.main import call, comfyctl
from runcomfy.domain.exceptions import InputFileInvalid, InputFileMissing, LocalError, ValueInvalid

POINTS = ("swap.written", "swap.kept", "swap.replaced", "swap.begun", "swap.put-back", "swap.ended", "swap.cleared")
R1 = {
    "launcher/generation_services.py": b'"""CONJURE\'s own."""\r\nMODES = ["local", "cloud"]\r\n',
    "launcher/api_server.py": b"from generation_services import MODES\n",
    "launcher/main.py": b"import subprocess_manager\n",
    "launcher/state_manager.py": b"class StateManager: ...\n",
    "launcher/config.py": b"GENERATION_MODE = 'local'\n",
    "runcomfy/runcomfy_client.py": b"class RunComfyAPIClient: ...\n",
    "runcomfy/dev_server_startup.py": b"print('their own, without a last newline')",
    "runcomfy/workflows/generate_flux_mesh.json": b"{}",
    "data/generated_text/userPrompt.txt": b"a chair\n",
}
R2 = {
    **R1,
    "launcher/local_comfyui_service.py": b"\xef\xbb\xbf# with a mark in front\n",
    "runcomfy/serverless_service.py": b"",
}


def make(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o640)
        os.utime(path, ns=(1_700_000_000_000_000_000, 1_700_000_000_123_456_000))
    return root


def seen(root: Path) -> dict[str, Any]:
    """Everything in the project: content, permissions, time of change."""
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mode, path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(params=["R1", "R2"])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make(tmp_path / "CONJURE", R1 if request.param == "R1" else R2)


def replaced(project: Path) -> set[str]:
    ours = {target.path: target.content() for target in TARGETS}
    return {
        path for path, content in ours.items() if (project / path).exists() and (project / path).read_bytes() == content
    }


def test_in_and_out_again_leaves_everything_as_it_was(project: Path) -> None:
    before = seen(project)
    found = find_project(project)
    assert found.revision == ("R2" if "launcher/local_comfyui_service.py" in before else "R1")
    assert status(found).state == "not installed"

    done = install(found)
    assert done.state == status(found).state == "installed"
    assert replaced(project) == {target.path for target in TARGETS} & set(before)
    assert {name for name, was in before.items() if seen(project).get(name) != was} == replaced(project)

    back = uninstall(found)
    assert back.state == status(found).state == "not installed"
    assert seen(project) == before
    assert not (project / FOLDER).exists()


def test_both_may_be_repeated(project: Path) -> None:
    before, found = seen(project), find_project(project)
    assert uninstall(found).state == "not installed"
    assert seen(project) == before
    install(found)
    once = {name: facts for name, facts in seen(project).items() if not name.startswith(FOLDER)}
    again = install(found)
    assert {file["what"] for file in again.files} == {"there already"}
    assert {name: facts for name, facts in seen(project).items() if not name.startswith(FOLDER)} == once
    uninstall(found)
    uninstall(found)
    assert seen(project) == before


def test_a_dry_run_touches_nothing(project: Path) -> None:
    before, found = seen(project), find_project(project)
    told = install(found, dry_run=True)
    assert told.files
    assert told.state == "not installed"
    assert seen(project) == before
    install(found)
    installed = seen(project)
    assert uninstall(found, dry_run=True).files
    assert seen(project) == installed


class Killed(BaseException):
    """The process ends here."""


def kill_at(point: str, visit: int) -> Callable[[str], None]:
    visits = 0

    def heard(name: str) -> None:
        nonlocal visits
        visits += name == point
        if name == point and visits == visit:
            raise Killed

    return heard


@pytest.mark.parametrize("then", [install, uninstall])
@pytest.mark.parametrize("visit", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_either_verb_goes_on(tmp_path: Path, point: str, visit: int, then: Callable[..., Any]) -> None:
    project = make(tmp_path / "CONJURE", R2)
    before, found = seen(project), find_project(project)
    reached = False
    for verb in (install, uninstall):
        try:
            with listening(kill_at(point, visit)):
                verb(found)
        except Killed:
            reached = True
            break
    assert reached == (visit == 1 or point in ("swap.replaced", "swap.put-back"))
    find_project(project)
    status(found)
    then(found)
    if then is install:
        assert status(found).state == "installed"
        uninstall(found)
    assert seen(project) == before
    assert not (project / FOLDER).exists()


@pytest.mark.processes
@pytest.mark.parametrize("fault", ["swap.kept:1:kill", "swap.replaced:1:kill", "swap.replaced:2:kill"])
def test_a_real_kill_in_the_middle_loses_nothing(tmp_path: Path, fault: str) -> None:
    project = make(tmp_path / "CONJURE", R2)
    before = seen(project)
    command = [sys.executable, "-m", "runcomfy.cli.main", "conjure", "install", str(project)]
    killed = subprocess.run(command, env={**os.environ, "FAULT": fault}, capture_output=True, check=False)
    assert killed.returncode != 0
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    assert status(find_project(project)).state == "installed"
    uninstall(find_project(project))
    assert seen(project) == before


@given(st.lists(st.sampled_from(["install", "uninstall", "kill install", "kill uninstall", "touch"]), max_size=8))
def test_no_story_loses_the_original(steps: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        project = make(Path(folder, "CONJURE"), R2)
        before, found = seen(project), find_project(project)
        for number, step in enumerate(steps):
            if step == "touch":
                (project / "launcher/api_server.py").write_bytes(before["launcher/api_server.py"][0])
                continue
            verb = install if step.endswith(" install") or step == "install" else uninstall
            try:
                if step.startswith("kill"):
                    with listening(kill_at(POINTS[number % len(POINTS)], 1)):
                        verb(found)
                else:
                    verb(found)
            except Killed:
                continue
        uninstall(found)
        assert {name: facts[0] for name, facts in seen(project).items()} == {n: f[0] for n, f in before.items()}
        assert not (project / FOLDER).exists()


@pytest.mark.parametrize("then", [install, uninstall])
@pytest.mark.parametrize("point", ["", "swap.written", "swap.kept", "swap.replaced"])
def test_files_of_an_older_version_are_renewed_also_after_a_crash(
    project: Path, point: str, then: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, found = seen(project), find_project(project)
    current = swap.Target.content
    with monkeypatch.context() as older:
        older.setattr(swap.Target, "content", lambda target: b"# an older one\n" + current(target))
        install(found)
    assert status(found).state == "installed"
    assert replaced(project) == set()
    if point:
        with pytest.raises(Killed), listening(kill_at(point, 1)):
            install(found)
    then(found)
    if then is install:
        assert status(found).state == "installed"
        assert replaced(project) == {file["path"] for file in status(found).files}
        uninstall(found)
    assert seen(project) == before


def test_a_file_changed_since_is_nobodys_to_overwrite(project: Path) -> None:
    before, found = seen(project), find_project(project)
    install(found)
    changed = project / "launcher/generation_services.py"
    changed.write_bytes(b"# mine now\n")
    installed = seen(project)
    assert status(found).state == "changed"
    for verb in (install, uninstall):
        with pytest.raises(ValueInvalid, match=r"launcher/generation_services\.py"):
            verb(found)
        assert seen(project) == installed
    forced = uninstall(found, force=True)
    assert changed.read_bytes() == before["launcher/generation_services.py"][0]
    kept = [path for path in (project / FOLDER).iterdir() if path.name != "manifest.json"]
    assert b"# mine now\n" in [path.read_bytes() for path in kept]
    assert any(FOLDER in note for note in forced.notes)


def test_a_newer_file_of_conjures_can_be_made_the_original(project: Path) -> None:
    found = find_project(project)
    install(found)
    newer = b"# after git pull\n"
    (project / "launcher/generation_services.py").write_bytes(newer)
    install(found, force=True)
    assert status(found).state == "installed"
    uninstall(found)
    assert (project / "launcher/generation_services.py").read_bytes() == newer


def test_a_file_that_came_back_by_itself_is_replaced_again(project: Path) -> None:
    """`git checkout` puts the original back behind our back."""
    before, found = seen(project), find_project(project)
    install(found)
    (project / "launcher/generation_services.py").write_bytes(before["launcher/generation_services.py"][0])
    assert status(found).state == "half installed"
    install(found)
    assert status(found).state == "installed"
    uninstall(found)
    assert {n: f[0] for n, f in seen(project).items()} == {n: f[0] for n, f in before.items()}


def test_where_conjure_has_no_such_file_ours_goes_away_again(tmp_path: Path) -> None:
    files = {name: content for name, content in R1.items() if name != "launcher/generation_services.py"}
    project = make(tmp_path / "CONJURE", files)
    before = seen(project)
    install(find_project(project))
    assert (project / "launcher/generation_services.py").exists()
    uninstall(find_project(project))
    assert seen(project) == before


def test_a_folder_that_is_not_conjure_is_refused_with_what_was_missed(tmp_path: Path) -> None:
    (tmp_path / "launcher").mkdir()
    (tmp_path / "launcher/main.py").touch()
    with pytest.raises(ValueInvalid, match=r"launcher/api_server\.py"):
        find_project(tmp_path)
    with pytest.raises(InputFileMissing):
        find_project(tmp_path / "nowhere")
    with pytest.raises(ValueInvalid, match="not a folder"):
        find_project(tmp_path / "launcher/main.py")
    with pytest.raises(ValueInvalid, match="this product itself"):
        find_project(Path(swap.__file__).parents[1])
    assert [path.name for path in tmp_path.rglob("*")] == ["launcher", "main.py"]


@pytest.mark.skipif(not hasattr(os, "symlink") or sys.platform == "win32", reason="links need rights on Windows")
@pytest.mark.parametrize("link", ["launcher", "launcher/generation_services.py", FOLDER])
def test_links_in_the_project_lead_nowhere(tmp_path: Path, link: str) -> None:
    project = make(tmp_path / "CONJURE", R2)
    outside = tmp_path / "outside"
    if (project / link).exists():
        (project / link).rename(outside)
    else:
        outside.mkdir()
    (project / link).symlink_to(outside)
    before, there = seen(project), seen(outside) if outside.is_dir() else outside.read_bytes()
    with pytest.raises(InputFileInvalid, match="link"):
        install(find_project(project))
    assert seen(project) == before
    assert (seen(outside) if outside.is_dir() else outside.read_bytes()) == there


def test_a_link_to_the_project_is_the_project(tmp_path: Path) -> None:
    project = make(tmp_path / "CONJURE", R1)
    (tmp_path / "link").symlink_to(project)
    assert find_project(tmp_path / "link").root == project


@pytest.mark.parametrize(
    "manifest",
    [
        "{",
        "[]",
        json.dumps({"schema": 9, "state": "installed", "python": "", "files": []}),
        json.dumps(
            {
                "schema": 1,
                "state": "installed",
                "python": "",
                "files": [
                    {"path": "../../x", "sha256": None, "mode": 420, "mtime_ns": 0, "shim_sha256": "0" * 64},
                ],
            }
        ),
        json.dumps(
            {
                "schema": 1,
                "state": "installed",
                "python": "",
                "files": [
                    {
                        "path": "launcher/generation_services.py",
                        "sha256": "../../../etc/passwd",
                        "mode": 420,
                        "mtime_ns": 0,
                        "shim_sha256": "0" * 64,
                    },
                ],
            }
        ),
    ],
)
def test_a_manifest_that_cannot_be_ours_is_not_believed(project: Path, manifest: str) -> None:
    install(find_project(project))
    (project / FOLDER / "manifest.json").write_text(manifest, encoding="utf-8")
    before = seen(project)
    for verb in (status, install, uninstall):
        with pytest.raises(InputFileInvalid, match=r"manifest\.json"):
            verb(find_project(project))
    assert seen(project) == before


def test_a_damaged_backup_is_not_put_back(project: Path) -> None:
    install(find_project(project))
    for path in (project / FOLDER).iterdir():
        if len(path.name) == 64:
            path.write_bytes(b"rotten")
    before = seen(project)
    with pytest.raises(InputFileInvalid, match="damaged"):
        uninstall(find_project(project))
    assert seen(project) == before


def test_two_at_once_do_not_work_against_each_other(project: Path) -> None:
    found = find_project(project)

    def second(name: str) -> None:
        if name == "swap.kept":
            with pytest.raises(LocalError, match="another"):
                uninstall(found) if (project / FOLDER / "manifest.json").exists() else install(found)

    with listening(second):
        install(found)
    assert status(found).state == "installed"


# -- the command -------------------------------------------------------------------------------------------


def test_the_command_says_what_it_did_and_how_to_undo_it(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(comfyctl, ["conjure", "install", str(project)]) == 0
    said = capsys.readouterr().out
    assert "launcher/generation_services.py" in said
    assert f"comfyctl conjure uninstall {project}" in said
    assert sys.executable in said
    assert call(comfyctl, ["conjure", "status", str(project), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["project"]) == ("installed", str(project))
    assert call(comfyctl, ["conjure", "status", str(project)]) == 0
    assert f"for this Python: {sys.executable}" in capsys.readouterr().out
    assert call(comfyctl, ["conjure", "uninstall", str(project), "--dry-run"]) == 0
    assert "would be" in capsys.readouterr().out
    assert call(comfyctl, ["conjure", "uninstall", str(project)]) == 0
    assert "put back" in capsys.readouterr().out
    assert call(comfyctl, ["conjure", "status", str(project)]) == 0
    assert "not installed" in capsys.readouterr().out


def test_the_launcher_folder_stands_for_its_project(project: Path, tmp_path: Path) -> None:
    assert find_project(project / "launcher") == find_project(project)
    with pytest.raises(ValueInvalid, match="is not a CONJURE project"):
        find_project(project / "runcomfy")
    few = make(tmp_path / "few", {"launcher/config.py": b"", "launcher/subprocess_manager.py": b""})
    assert find_project(few / "launcher").root == few
    with pytest.raises(ValueInvalid, match="is not a CONJURE project"):
        find_project(make(tmp_path / "other", {"launcher/config.py": b"", "launcher/main.py": b""}))
    with pytest.raises(ValueInvalid, match="this product itself"):
        find_project(Path(swap.__file__).parent)


def test_the_command_refuses_with_two_lines_and_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(comfyctl, ["conjure", "install", str(tmp_path)]) == 2
    assert "is not a CONJURE project" in capsys.readouterr().err
    assert call(comfyctl, ["conjure", "install", str(tmp_path), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "value-invalid"


def test_the_command_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(comfyctl, ["--help"]) == 0
    assert "conjure" in capsys.readouterr().out
