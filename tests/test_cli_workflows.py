"""`comfyctl workflows`, as its user sees it: what is printed, and the exit code."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from runcomfy.cli.main import call, comfyctl
from runcomfy.cli.runner import Interrupts
from runcomfy.cli.workflows import _check
from runcomfy.domain.exceptions import PreflightFailed
from runcomfy.testing.emulators.comfyui.nodes.base import InputSpec, NodeClass, NodeContext, NodeResult
from runcomfy.testing.emulators.comfyui.server import ComfyUIEmulator

Said = tuple[int, str, str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line; return exit code, stdout, stderr."""

    def run(*words: str) -> Said:
        code = call(comfyctl, ["workflows", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_what_ships_is_listed(say: Any) -> None:
    code, out, err = say("ls")
    assert (code, err) == (0, "")
    assert "generate_flux_mesh" in out
    assert "--image --prompt" in out
    code, out, _ = say("ls", "--json")
    assert [(each["name"], each["node_count"]) for each in json.loads(out)] == [
        ("flux_image", 9),
        ("generate_flux_mesh", 18),
        ("generate_flux_mesh2", 23),
        ("image_invert", 3),
        ("image_to_mesh", 6),
        ("wf_realistic_portrait", 7),
    ]


def test_show_tells_inputs_seeds_results_nodes_and_models(say: Any) -> None:
    code, out, _ = say("show", "generate_flux_mesh")
    assert code == 0
    for word in ("--image", "34.clip_l, 34.t5xxl", "3.noise_seed", "18446744073709551615", "mesh.glb", "INPUTIMAGE"):
        assert word in out
    assert "models/xlabs/controlnets" in out
    code, out, _ = say("show", "generate_flux_mesh", "--json")
    facts = json.loads(out)
    assert [item["name"] for item in facts["inputs"] if item["required"]] == ["image", "prompt"]
    assert {seed["target"] for seed in facts["seeds"]} == {"3.noise_seed", "32.seed"}
    assert [(item["name"], item["node"]) for item in facts["outputs"]] == [("flux", "24"), ("mesh", "33")]
    assert len(facts["nodes"]) == facts["node_count"] == 18
    assert len(facts["packs"]) == 4


def test_show_of_a_file_without_a_sidecar_tells_what_would_be_found(say: Any, tmp_path: Path) -> None:
    graph = {
        "1": {"class_type": "CLIPTextEncode", "inputs": {"text": "cat"}},
        "2": {"class_type": "KSampler", "inputs": {"seed": 3, "positive": ["1", 0]}},
        "3": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
    }
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(graph))
    facts = json.loads(say("show", str(file), "--json")[1])
    assert facts["name"] == "mine"
    assert [(item["name"], item["targets"]) for item in facts["inputs"]] == [("prompt", ["1.text"])]
    assert facts["seeds"] == [{"target": "2.seed", "minimum": None, "maximum": None}]
    assert facts["models"] == [{"file": "ae.safetensors", "folder": "vae", "note": "", "url": ""}]
    assert facts["outputs"] == []
    assert "everything that its output nodes report" in say("show", str(file))[1]


def test_check_of_a_sound_file_says_so_and_what_was_not_done(say: Any) -> None:
    code, out, _ = say("check", "generate_flux_mesh")
    assert code == 0
    assert "18 nodes, sound, its sidecar fits" in out
    assert "--server" in out
    code, out, _ = say("check", "image_invert", "--json")
    assert code == 0
    assert json.loads(out)["ok"] is True


@pytest.mark.parametrize(
    ("content", "sidecar", "code_word"),
    [
        (None, None, "workflow-not-found"),
        ("{", None, "workflow-not-json"),
        ('{"nodes": [], "links": []}', None, "workflow-ui-format"),
        ('{"1": {"class_type": "A", "inputs": {"x": ["9", 0]}}}', None, "workflow-invalid"),
        ('{"1": {"class_type": "A", "inputs": {}}}', '[outputs.x]\nnode = "7"\nkind = "image"', "workflow-invalid"),
        ('{"1": {"class_type": "A", "inputs": {}}}', "output = 3", "workflow-invalid"),
    ],
)
def test_what_is_wrong_is_two_lines_and_exit_code_two(
    say: Any, tmp_path: Path, content: str | None, sidecar: str | None, code_word: str
) -> None:
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content)
    if sidecar is not None:
        file.with_suffix(".toml").write_text(sidecar)
    for command in ("check", "show"):
        code, out, err = say(command, str(file))
        assert (code, out) == (2, "")
        assert f"[{code_word}]" in err
        assert len(err.splitlines()) == 2
    code, out, err = say("check", str(file), "--json")
    assert (code, err) == (2, "")
    assert json.loads(out)["error"]["code"] == code_word


# --- against a machine ----------------------------------------------------------------------------------------


async def _nothing(_: NodeContext, __: dict[str, Any]) -> NodeResult:
    return NodeResult()


def machine(*, models: list[str]) -> ComfyUIEmulator:
    """A server with the nodes of `graph_file`, and these models."""
    listed = [
        NodeClass("LoadImage", _nothing, InputSpec({"image": [["a.png"], {"image_upload": True}]}), ("IMAGE",)),
        NodeClass("VAELoader", _nothing, InputSpec({"vae_name": [models]}), ("VAE",)),
        NodeClass("VAEEncode", _nothing, InputSpec({"pixels": ["IMAGE"], "vae": ["VAE"]}), ("LATENT",)),
        NodeClass("SaveLatent", _nothing, InputSpec({"samples": ["LATENT"]}), output_node=True),
    ]
    return ComfyUIEmulator(nodes={each.name: each for each in listed})


@pytest.fixture
def graph_file(tmp_path: Path) -> str:
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "mine.png"}},
        "2": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors"}},
        "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["1", 0], "vae": ["2", 0]}},
        "4": {"class_type": "SaveLatent", "inputs": {"samples": ["3", 0]}},
    }
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(graph))
    return str(file)


async def test_a_machine_that_has_everything_is_told_with_the_files_it_must_hold(
    graph_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async with machine(models=["ae.safetensors"]) as comfyui:
        assert await _check(Interrupts(None), graph_file, comfyui.url, as_json=False) == 0
        out = capsys.readouterr().out
        assert "has every node" in out
        assert "mine.png (1.image)" in out
        assert await _check(Interrupts(None), graph_file, comfyui.url, as_json=True) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["ok"] is True
        assert facts["files"] == [{"target": "1.image", "name": "mine.png"}]
        assert comfyui.run_log == []


@pytest.mark.fault(36)
async def test_a_machine_that_lacks_a_model_and_a_node_is_told_with_both(
    tmp_path: Path, graph_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = json.loads(await asyncio.to_thread(Path(graph_file).read_text))
    graph["5"] = {"class_type": "SaveLatents", "inputs": {"samples": ["3", 0]}}
    file = tmp_path / "two.json"
    await asyncio.to_thread(file.write_text, json.dumps(graph))
    async with machine(models=["other.safetensors"]) as comfyui:
        with pytest.raises(PreflightFailed) as caught:
            await _check(Interrupts(None), str(file), comfyui.url, as_json=False)
        out = capsys.readouterr().out
        assert "missing-model: node 2" in out
        assert "models/vae" in out
        assert "did you mean SaveLatent?" in out
        assert caught.value.exit_code == 2
        assert await _check(Interrupts(None), str(file), comfyui.url, as_json=True) == 2
        facts = json.loads(capsys.readouterr().out)
        assert {problem["code"] for problem in facts["problems"]} == {"missing-model", "unknown-class"}
        assert facts["ok"] is False
