"""Which graph a workflow's id stands for; and the portrait that ships, on an emulated ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import workflows
from runcomfy.adapters.workflow_files import WorkflowFiles
from runcomfy.adapters.workflow_registry import Resolved, WorkflowRegistry
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import SettingInvalid, WorkflowNotFound
from runcomfy.domain.job import JobRequest, JobStatus
from runcomfy.testing.emulators.comfyui import ComfyUIEmulator

GUIDE = """\
wf_realistic_portrait:
  template_path: "workflows/wf_realistic_portrait.json"
  required_inputs: ["prompt", "seed", "steps"]
"""


def registry(root: Path, text: str | None = None) -> WorkflowRegistry:
    file = root / "comfyui_agent" / "config" / "workflows.yaml"
    if text is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return WorkflowRegistry(
        root=str(root), workflows_file=str(file) if file.exists() else None, shipped=workflows.names
    )


def test_the_guides_entry_serves_with_and_without_a_file_of_its_own(tmp_path: Path) -> None:
    guide = registry(tmp_path, GUIDE)
    found = guide.resolve("wf_realistic_portrait")
    assert found == Resolved("wf_realistic_portrait", required_inputs=("prompt", "seed", "steps"))
    own = tmp_path / "workflows" / "wf_realistic_portrait.json"
    own.parent.mkdir()
    own.write_text("{}")
    assert guide.resolve("wf_realistic_portrait").workflow == str(own)


def test_without_a_file_the_shipped_workflows_go_by_their_names(tmp_path: Path) -> None:
    assert registry(tmp_path).resolve("image_invert") == Resolved("image_invert")
    assert registry(tmp_path).names() == workflows.names()


def test_a_users_entry_counts_more_than_what_ships(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text("{}")
    found = registry(tmp_path, "image_invert: {template_path: mine.json, inputs: {pic: 1.image}}")
    assert found.resolve("image_invert") == Resolved(str(mine), {"pic": "1.image"})
    assert found.names() == workflows.names()


def test_a_template_may_lie_beside_the_list(tmp_path: Path) -> None:
    found = registry(tmp_path, "a: {template_path: graphs/a.json, description: one}")
    beside = tmp_path / "comfyui_agent" / "config" / "graphs" / "a.json"
    beside.parent.mkdir()
    beside.write_text("{}")
    assert found.resolve("a").workflow == str(beside)
    assert found.resolve("a").description == "one"


def test_an_unknown_id_is_answered_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(WorkflowNotFound) as caught:
        registry(tmp_path, GUIDE).resolve("wf_realistic_potrait")
    assert "did you mean wf_realistic_portrait" in caught.value.hint
    with pytest.raises(WorkflowNotFound) as caught:
        registry(tmp_path, GUIDE).resolve("qqq")
    for name in workflows.names():
        assert name in caught.value.hint


def test_a_missing_template_is_named_with_every_place_that_was_looked_at(tmp_path: Path) -> None:
    found = registry(tmp_path, "x:\n  template_path: graphs/none.json\n")
    with pytest.raises(WorkflowNotFound) as caught:
        found.resolve("x")
    assert str(tmp_path / "graphs" / "none.json") in caught.value.message
    assert "workflows.yaml, line 1" in caught.value.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a:\n  template: x.json\n", "line 2, a.template: there is no such field"),
        ("a:\n  required_inputs: [x]\n", "line 1, a.template_path: it is missing"),
        ("a:\n  template_path: x\n  required_inputs: x\n", "line 3, a.required_inputs: expected a list, found x"),
        ("a:\n  template_path: x\n  inputs: [x]\n", "line 3, a.inputs: expected names with targets, found a list"),
        ("a:\n  template_path: [x]\n", "line 2, a.template_path: expected a text, found a list"),
        ("a: x.json", "line 1, a: expected template_path and required_inputs, found x.json"),
        ("- a", "line 1: expected ids of workflows, found a list"),
        ("a: {template_path: x}\na: {template_path: y}", "line 2, a: it is there twice"),
    ],
)
def test_mistakes_in_the_list_are_told_with_line_and_field(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingInvalid) as caught:
        registry(tmp_path, text).resolve("image_invert")
    assert words in caught.value.message
    assert "workflows.yaml" in caught.value.message


def test_the_list_is_read_again_when_it_changes(tmp_path: Path) -> None:
    found = registry(tmp_path, GUIDE)
    before = found.marks()
    assert found.names() == workflows.names()
    registry(tmp_path, GUIDE + "other: {template_path: image_invert.json}\n")
    assert found.resolve("other").workflow == "image_invert"
    assert found.marks() != before
    again = found.marks()
    (tmp_path / "image_invert.json").write_text("{}")
    assert found.marks() != again
    (tmp_path / "comfyui_agent" / "config" / "workflows.yaml").unlink()
    assert found.names() == workflows.names()


def test_the_portrait_that_ships_has_the_inputs_the_guide_names() -> None:
    graph, sidecar, name = WorkflowFiles(workflows.names, workflows.load)("wf_realistic_portrait")
    assert name == "wf_realistic_portrait"
    assert sidecar is not None
    classes = {node["class_type"] for node in json.loads(graph).values()}
    assert {"KSampler", "CheckpointLoaderSimple", "SaveImage"} <= classes
    for wanted in ("prompt", "seed", "steps", "cfg", "width", "height", "negative_prompt"):
        assert f"[inputs.{wanted}]" in sidecar


async def test_the_portrait_that_ships_runs(tmp_path: Path) -> None:
    async with ComfyUIEmulator() as server, App() as app:
        request = JobRequest(
            "wf_realistic_portrait",
            prompt="a knight in rain",
            seed=123456,
            sets={"steps": 4, "width": 64, "height": 96},
            server_url=server.url,
            out_dir=str(tmp_path / "out"),
        )
        result = await app.orchestrator().run(request)
    assert (result.status, result.error) == (JobStatus.DONE, None)
    assert result.seeds == {"3.seed": 123456}
    (output,) = result.outputs
    assert Path(output.path).name == "portrait.png"
