"""A new project: everything the guide names, and nothing of the user's lost."""

from __future__ import annotations

from pathlib import Path

import pytest

import workflows
from runcomfy.adapters.agent_config import is_project, load_queue_settings
from runcomfy.adapters.agent_project import init_project
from runcomfy.adapters.config import default_settings
from runcomfy.adapters.workflow_registry import WorkflowRegistry
from runcomfy.domain.exceptions import LocalError

CONFIG = "comfyui_agent/config/global_config.yaml"


def test_a_new_project_has_the_guides_folders_and_its_settings_are_the_defaults(tmp_path: Path) -> None:
    done = init_project(tmp_path, load=workflows.load)
    for base in ("jobs/processing", "jobs/finished"):
        for kind in ("image", "video", "audio", "speech", "3d"):
            assert (tmp_path / base / kind).is_dir()
            assert f"{base}/{kind}/" in done.made
    assert (done.left, done.backups) == ((), ())
    assert is_project(tmp_path)
    settings = load_queue_settings(settings=default_settings(state_dir="s"), env={}, cwd=tmp_path)
    assert settings.warnings == ()
    assert settings.config_file == str(tmp_path / CONFIG)
    assert settings.database.reveal() == str(tmp_path / "database" / "comfyui_agent.db")
    assert (settings.default_priority, settings.retry_limit, settings.where) == (50, 2, "server")
    registry = WorkflowRegistry(root=settings.root, workflows_file=settings.workflows_file, shipped=workflows.names)
    found = registry.resolve("wf_realistic_portrait")
    assert found.workflow == str(tmp_path / "workflows" / "wf_realistic_portrait.json")
    assert found.required_inputs == ("prompt", "seed", "steps")
    assert (tmp_path / "workflows" / "wf_realistic_portrait.toml").is_file()


def test_every_setting_that_is_only_shown_can_be_used_as_it_is_shown(tmp_path: Path) -> None:
    init_project(tmp_path, load=workflows.load)
    config = tmp_path / CONFIG
    before, _, shown = config.read_text().partition("# agent:")
    config.write_text(before + "agent:" + shown.replace("\n# ", "\n"))
    settings = load_queue_settings(settings=default_settings(state_dir="s"), env={}, cwd=tmp_path)
    assert (settings.slots, settings.limit_place, settings.warnings) == (1, 1, ())


def test_what_is_there_is_left_and_with_force_kept_beside(tmp_path: Path) -> None:
    init_project(tmp_path, load=workflows.load)
    config = tmp_path / CONFIG
    config.write_text("retry_limit: 9\n")
    again = init_project(tmp_path, load=workflows.load)
    assert again.made == ()
    assert CONFIG in again.left
    assert config.read_text() == "retry_limit: 9\n"
    for number in (1, 2):
        config.write_text(f"retry_limit: {number}\n")
        forced = init_project(tmp_path, load=workflows.load, force=True)
        assert forced.made == (CONFIG,)
        (backup,) = forced.backups
        assert (tmp_path / backup).read_text() == f"retry_limit: {number}\n"
    assert "default_priority: 50" in config.read_text()


def test_a_project_with_a_plain_config_folder_gets_no_second_one(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "global_config.yaml").write_text("retry_limit: 9\n")
    done = init_project(tmp_path, load=workflows.load)
    assert "config/workflows.yaml" in done.made
    assert not (tmp_path / "comfyui_agent").exists()


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("a file")
    with pytest.raises(LocalError) as caught:
        init_project(tmp_path, load=workflows.load)
    assert str(tmp_path / "jobs") in caught.value.message
