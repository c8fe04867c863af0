"""What a node list says against a graph, held against what a real server said (recordings 04, 10, 13, 16, 17)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import workflows
from runcomfy.domain.binding import bind
from runcomfy.domain.exceptions import BadInput, PreflightFailed
from runcomfy.domain.job import JobRequest
from runcomfy.domain.preflight import (
    MAX_INPUTS,
    Problem,
    files_to_check,
    model_files,
    preflight,
    require_runnable,
)
from runcomfy.domain.sidecar import Sidecar
from runcomfy.domain.workflow import Workflow

RECORDINGS = Path(__file__).parents[1] / "recordings"


def exchanges(name: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The requests of a recording, each with its answer."""
    requests: dict[int, dict[str, Any]] = {}
    for line in (RECORDINGS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["dir"] == "http-req":
            requests[entry["n"]] = entry
        elif entry["dir"] == "http-res":
            yield requests[entry["n"]], entry


def recorded_node_info() -> dict[str, Any]:
    """The node list's entries that a real server (0.33.0) sent one by one."""
    found: dict[str, Any] = {}
    for request, answer in exchanges("10-history-queue-info"):
        if request["path"].startswith("/object_info/"):
            found.update(answer["json"])
    return found


def entry(output: list[Any], *, output_node: bool = False, optional: Any = None, **required: Any) -> dict[str, Any]:
    inputs = {"required": required, **({"optional": optional} if optional else {})}
    return {"input": inputs, "output": output, "output_node": output_node}


DYNAMIC_FORMAT = [
    "COMFY_DYNAMICCOMBO_V3",
    {
        "options": [
            {
                "key": "png",
                "inputs": {
                    "required": {
                        "bit_depth": ["COMBO", {"options": ["8-bit", "16-bit"]}],
                        "input_color_space": ["COMBO", {"options": ["sRGB", "linear"]}],
                    }
                },
            },
            {"key": "exr", "inputs": {"required": {}, "optional": {"level": ["INT", {"min": 0, "max": 9}]}}},
        ]
    },
]

NODE_INFO = {
    **recorded_node_info(),
    "PreviewImage": entry(["IMAGE"], output_node=True, images=["IMAGE"]),
    "ImageInvert": entry(["IMAGE"], image=["IMAGE"]),
    "PrimitiveString": entry(["STRING"], value=["STRING", {}]),
    "ImageScale": entry(
        ["IMAGE"],
        image=["IMAGE"],
        upscale_method=[["nearest-exact", "bilinear", "area", "bicubic", "lanczos"]],
        width=["INT", {"min": 0, "max": 16384}],
        height=["INT", {"min": 0, "max": 16384}],
        crop=[["disabled", "center"]],
    ),
    "SaveImageAdvanced": entry(
        [], output_node=True, images=["IMAGE"], filename_prefix=["STRING"], format=DYNAMIC_FORMAT
    ),
}

SERVER_WORDS = {
    "required_input_missing": "input-missing",
    "return_type_mismatch": "bad-link",
    "invalid_input_type": "value-unreadable",
    "value_smaller_than_min": "value-too-small",
    "value_bigger_than_max": "value-too-large",
    "value_not_in_list": "value-not-in-list",
    "exception_during_validation": "bad-link",  # a slot that is not there
}


def codes(problems: list[Problem]) -> set[tuple[str, str]]:
    return {(problem.node_id, problem.code) for problem in problems}


def recorded_prompts() -> list[tuple[Any, dict[str, Any]]]:
    found = []
    for name in ("04-validation-failures", "16-older-server-0.3.64", "17-older-server-0.10.0"):
        for request, answer in exchanges(name):
            body = request.get("json")
            if request["path"] == "/prompt" and isinstance(body, dict) and "prompt" in body:
                odd = not isinstance(body.get("number", 0), int) or body.get("extra_data", {}) is None
                if not odd and isinstance(body.get("prompt_id", ""), str):
                    found.append((body["prompt"], answer))
    return found


def known(graph: Any) -> bool:
    """Whether our node list has all the classes that the recorded server had."""
    classes = [str(raw.get("class_type")) for raw in graph.values() if isinstance(raw, dict)]
    return not any(name == "VoxelToMesh" or name.startswith("Probe") for name in classes)


@pytest.mark.fault(36)
def test_a_real_servers_word_on_every_recorded_prompt_is_ours_too() -> None:
    refused = accepted = 0
    for graph, answer in recorded_prompts():
        if isinstance(graph, dict) and not known(graph):
            continue
        said = answer.get("json", {})
        good = answer["status"] == 200 and not said.get("node_errors")
        try:
            flow = Workflow.parse(graph if isinstance(graph, dict) else json.dumps(graph))
        except BadInput:
            assert not good, graph
            refused += 1
            continue
        problems = preflight(flow.graph, NODE_INFO)
        missing_files = files_to_check(flow.graph, NODE_INFO)
        node_errors = said.get("node_errors", {})
        theirs = {(node, e["type"]) for node, found in node_errors.items() for e in found["errors"]}
        if ("1", "custom_validation_failed") in theirs:  # LoadImage looked for its file: nothing a list can tell
            assert not problems
            assert [file.name for file in missing_files] == ["absent.png"]
        elif theirs:
            assert codes(problems) == {(node, SERVER_WORDS[word]) for node, word in theirs}
        elif good:
            assert problems == [], graph
        else:
            word = {"missing_node_type": "unknown-class", "invalid_prompt": "unknown-class"}.get(
                said["error"]["type"], "no-output"
            )
            assert word in {problem.code for problem in problems}
        refused += not good
        accepted += good
    assert refused >= 20
    assert accepted >= 8


def test_nested_choices_are_judged_as_the_recorded_server_did() -> None:
    verdicts = []
    for request, answer in exchanges("13-output-kinds"):
        graph = (request.get("json") or {}).get("prompt")
        if not isinstance(graph, dict) or graph["9"]["class_type"] != "SaveImageAdvanced":
            continue
        found = preflight(Workflow.parse(graph).graph, NODE_INFO)
        verdicts.append({problem.input_name for problem in found})
        errors = answer["json"].get("node_errors", {}).get("9", {}).get("errors", [])
        assert verdicts[-1] == {error["extra_info"]["input_name"] for error in errors}
    assert verdicts == [{"format.bit_depth", "format.input_color_space"}, set()]


def test_all_problems_are_named_not_just_the_first() -> None:
    graph = Workflow.parse(
        {
            "1": {
                "class_type": "EmptyImage",
                "inputs": {"width": 0, "height": "tall", "color": 5},
                "_meta": {"title": "Canvas"},
            },
            "2": {"class_type": "ImageScael", "inputs": {"image": ["1", 0]}},
            "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
            "4": {"class_type": "PreviewImage", "inputs": {"images": ["1", 1]}},
        }
    ).graph
    problems = preflight(graph, NODE_INFO, class_names=["ImageScale", "ImageBlur"])
    assert codes(problems) == {
        ("1", "value-too-small"),
        ("1", "value-unreadable"),
        ("1", "input-missing"),
        ("2", "unknown-class"),
        ("4", "bad-link"),
    }
    assert all(problem.hint and problem.node_id in problem.message for problem in problems)
    assert {problem.title for problem in problems if problem.node_id == "1"} == {"Canvas"}
    [unknown] = [problem for problem in problems if problem.code == "unknown-class"]
    assert "ImageScale" in unknown.hint
    with pytest.raises(PreflightFailed) as caught:
        require_runnable(problems)
    assert len(caught.value.details["problems"]) == 5
    assert "2 more" in caught.value.message
    require_runnable([])


def shipped_info(**changes: Any) -> dict[str, Any]:
    """A node list on which the shipped workflow runs."""
    clips = ["clip_l.safetensors", "t5xxl_fp8_e4m3fn.safetensors"]
    steps = ["INT", {"min": 1, "max": 100}]
    found: dict[str, Any] = {
        **NODE_INFO,
        "XlabsSampler": entry(
            ["LATENT"], model=["MODEL"], conditioning=["CONDITIONING"], neg_conditioning=["CONDITIONING"],
            noise_seed=["INT", {"min": 0, "max": 2**64 - 1}], steps=steps, latent_image=["LATENT"],
            optional={"controlnet_condition": ["ControlNetCondition"]},
        ),
        "DualCLIPLoader": entry(["CLIP"], clip_name1=[clips], clip_name2=[clips], type=[["sdxl", "flux"]]),
        "EmptyLatentImage": entry(["LATENT"], width=["INT", {"min": 16, "max": 16384}], height=["INT", {}]),
        "VAEDecode": entry(["IMAGE"], samples=["LATENT"], vae=["VAE"]),
        "VAELoader": entry(["VAE"], vae_name=[["ae.safetensors"]]),
        "UNETLoader": entry(["MODEL"], unet_name=[["flux1-dev-fp8.safetensors"]]),
        "LoadFluxControlNet": entry(
            ["FluxControlNet"], model_name=[["flux-dev", "flux-dev-fp8"]],
            controlnet_path=[["flux-depth-controlnet-v3.safetensors"]],
        ),
        "ApplyFluxControlNet": entry(["ControlNetCondition"], controlnet=["FluxControlNet"], image=["IMAGE"]),
        "CLIPTextEncodeFlux": entry(["CONDITIONING"], clip=["CLIP"], clip_l=["STRING", {}], t5xxl=["STRING", {}]),
        "DepthAnythingPreprocessor": entry(["IMAGE"], image=["IMAGE"]),
        "PartPacker_Loader": entry(
            ["PartPacker"], checkpoint=["COMBO", {"options": ["flow.pt"]}], vae=[["partpacker_vae.pt"]]
        ),
        "PartPacker_Sampler": entry(
            ["TRIMESH", "MESH", "STRING"], model=["PartPacker"], image=["IMAGE"],
            seed=["INT", {"min": 0, "max": 2**31 - 1}],
        ),
        "RemBGSession+": entry(["REMBG_SESSION"], model=[["u2net: general purpose"]], providers=[["CPU", "CUDA"]]),
        "ImageRemoveBackground+": entry(["IMAGE", "MASK"], rembg_session=["REMBG_SESSION"], image=["IMAGE"]),
    }  # fmt: skip
    return {**found, **changes}


def shipped_graph() -> dict[str, Any]:
    return Workflow.parse(workflows.load("generate_flux_mesh")[0]).graph


def test_the_shipped_workflow_passes_on_a_machine_that_has_its_nodes_and_models() -> None:
    assert preflight(shipped_graph(), shipped_info()) == []
    assert [file.name for file in files_to_check(shipped_graph(), shipped_info())] == ["render.png"]
    assert files_to_check(shipped_graph(), shipped_info(), uploads=[("16", "image")]) == []


@pytest.mark.parametrize(
    ("changes", "places", "folder"),
    [
        ({"VAELoader": entry(["VAE"], vae_name=[["sdxl.safetensors"]])}, {"8.vae_name"}, "models/vae"),
        ({"VAELoader": entry(["VAE"], vae_name=[[]])}, {"8.vae_name"}, "models/vae"),
        ({"UNETLoader": entry(["MODEL"], unet_name=["COMBO", {"options": []}])}, {"10.unet_name"}, "diffusion_models"),
        ({"DualCLIPLoader": entry(["CLIP"], clip_name1=[["x.sft"]])}, {"4.clip_name1"}, "models/text_encoders"),
        ({"PartPacker_Loader": entry(["PartPacker"], checkpoint=[["other.pt"]])}, {"30.checkpoint"}, "PartPacker"),
    ],
)
def test_a_missing_model_is_named_with_the_folder_it_belongs_in(
    changes: dict[str, Any], places: set[str], folder: str
) -> None:
    problems = preflight(shipped_graph(), shipped_info(**changes))
    assert {f"{problem.node_id}.{problem.input_name}" for problem in problems} == places
    assert {problem.code for problem in problems} == {"missing-model"}
    assert folder in problems[0].hint


def test_the_models_a_graph_names_are_listed_with_their_folders() -> None:
    found = {
        f"{model.node_id}.{model.input_name}": (model.file, model.folder) for model in model_files(shipped_graph())
    }
    assert found == {
        "4.clip_name1": ("clip_l.safetensors", "text_encoders"),
        "4.clip_name2": ("t5xxl_fp8_e4m3fn.safetensors", "text_encoders"),
        "8.vae_name": ("ae.safetensors", "vae"),
        "10.unet_name": ("flux1-dev-fp8.safetensors", "diffusion_models"),
        "13.controlnet_path": ("flux-depth-controlnet-v3.safetensors", "xlabs/controlnets"),
        "25.ckpt_name": ("depth_anything_vitl14.pth", ""),
        "30.checkpoint": ("flow.pt", "PartPacker"),
        "30.vae": ("partpacker_vae.pt", "vae"),
    }
    vision = {"1": {"class_type": "CLIPVisionLoader", "inputs": {"clip_name": "v.safetensors"}}}
    assert [model.folder for model in model_files(vision)] == ["clip_vision"]


def test_a_missing_node_pack_is_named_node_by_node() -> None:
    info = {name: known for name, known in shipped_info().items() if not name.startswith("PartPacker")}
    problems = preflight(shipped_graph(), info)
    assert codes(problems) == {("30", "unknown-class"), ("32", "unknown-class")}
    assert "PartPacker_Sampler" in problems[1].message


def test_a_file_that_is_still_to_be_uploaded_is_not_looked_for_in_any_list() -> None:
    text, toml = workflows.load("image_invert")
    flow = Workflow.parse(text)
    bound = bind(flow, Sidecar.parse(toml or ""), JobRequest("x", image="new.png"), random_int=lambda low, _: low)
    strict = {**NODE_INFO, "LoadImage": entry(["IMAGE", "MASK"], image=[["old.png"]])}
    assert codes(preflight(bound.graph, strict)) == {("1", "value-not-in-list")}
    assert preflight(bound.graph, strict, uploads=bound.waiting) == []


def one(spec: Any, value: Any, **others: Any) -> list[Problem]:
    """Judge one value against one input's entry."""
    graph = {"1": {"class_type": "N", "inputs": {"x": value}}, **others}
    return preflight(graph, {**NODE_INFO, "N": entry([], output_node=True, x=spec)})


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        (["INT", {"min": 1, "max": 9}], "8"),
        (["INT", {"min": 1, "max": 9}], " 8 "),
        (["INT", {"min": 1, "max": 9}], 9.9),  # int() cuts before the range is looked at
        (["INT", {"min": 1, "max": 9}], True),
        (["INT", {"min": 1, "max": 9}], {"__value__": 5}),
        (["INT"], 10**30),
        (["INT", {"min": None, "max": "many"}], 3),
        (["FLOAT", {"min": 0, "max": 1}], "0.5"),
        (["FLOAT", {}], "nan"),
        (["STRING", {"min": 3}], "x"),
        (["STRING", {}], None),
        (["BOOLEAN", {}], "no"),
        ([["a", "b"]], "b"),
        ([["a", "b"], {"multiselect": True}], {"__value__": ["b", "a"]}),
        ([[1, 2]], 1.0),
        (["COMBO", {"options": ["a"]}], "a"),
        (["COMBO", {"remote": {"route": "/x"}, "options": []}], "anything"),
        (["COMBO", {"remote_combo": {"route": "/x"}, "options": []}], "anything"),
        (["COMBO", {}], "anything"),
        ([["old.png"], {"image_upload": True}], "clipspace/new.png [input]"),
        ([["old.mp4"], {"video_upload": True}], "new.mp4"),
        (["COMBO", {"options": [], "audio_upload": True}], "new.wav"),
        (["IMAGE", {"lazy": True}], "a literal where a link belongs"),
        (["FLOAT", {"forceInput": True}], 1),
        (["SOMETHING_NEW", {"min": 3}], {"free": "form"}),
        (["COMFY_DYNAMICCOMBO_V3", {"options": []}], "unheard of"),
    ],
)
def test_what_the_server_takes_is_never_refused(spec: Any, value: Any) -> None:
    assert one(spec, value) == []


@pytest.mark.parametrize(
    ("spec", "value", "code"),
    [
        (["INT", {"min": 1}], 0.9, "value-too-small"),
        (["INT", {}], "8.0", "value-unreadable"),
        (["INT", {}], None, "value-unreadable"),
        (["INT", {}], {"a": 1}, "value-unreadable"),
        (["INT", {}], {"__value__": [1]}, "value-unreadable"),
        (["FLOAT", {"max": 1}], "1.5", "value-too-large"),
        (["FLOAT", {}], "much", "value-unreadable"),
        ([["a", "b"]], "c", "value-not-in-list"),
        ([["a", "b"]], None, "value-not-in-list"),
        ([["a"], {"multiselect": True}], {"__value__": ["a", "z"]}, "value-not-in-list"),
        ([["a", "b"]], {"__value__": ["a"]}, "value-not-in-list"),
        ([[]], "a", "value-not-in-list"),
        (["COMBO", {"options": ["a"]}], "b", "value-not-in-list"),
        ([["a.ckpt", "b.ckpt"]], "c", "missing-model"),
        ([["None"]], "my.gguf", "missing-model"),
        (["IMAGE"], ["9", 0], "bad-link"),
        (["IMAGE"], ["1", 0, 0], "bad-link"),
    ],
)
def test_what_the_server_refuses_is_found(spec: Any, value: Any, code: str) -> None:
    assert [problem.code for problem in one(spec, value)] == [code]


@pytest.mark.parametrize(
    ("received", "wanted", "fits"),
    [
        ("IMAGE", "IMAGE", True),
        ("IMAGE", "MASK", False),
        ("*", "MASK", True),
        ("IMAGE", "*", True),
        ("MESH", "MESH,FILE_3D_GLB", True),
        ("FILE_3D_GLB, MESH", "MESH", True),
        ("VOXEL", "MESH,FILE_3D_GLB", False),
        ("COMFY_MATCHTYPE_V3", "IMAGE", True),
        ("IMAGE", "COMFY_MATCHTYPE_V3", True),
        (["a", "b"], ["a", "b"], True),
        ("STRING", ["a", "b"], False),
        ("COMBO", ["a", "b"], True),
        (None, "IMAGE", True),
        ({"odd": 1}, "IMAGE", True),
    ],
)
def test_links_fit_as_the_server_judges_types(received: Any, wanted: Any, fits: bool) -> None:
    graph = {"1": {"class_type": "S", "inputs": {}}, "2": {"class_type": "N", "inputs": {"x": ["1", 0]}}}
    info = {"S": entry([received]), "N": entry([], output_node=True, x=[wanted, {}])}
    assert [problem.code for problem in preflight(graph, info)] == ([] if fits else ["bad-link"])


@pytest.mark.parametrize(("slot", "fits"), [(0, True), (1, True), (2, False), (-1, True), (-3, False)])
def test_an_output_number_must_exist_and_counts_as_in_python(slot: int, fits: bool) -> None:
    graph = {"1": {"class_type": "S", "inputs": {}}, "2": {"class_type": "N", "inputs": {"x": ["1", slot]}}}
    info = {"S": entry(["IMAGE", "IMAGE"]), "N": entry([], output_node=True, x=["IMAGE"])}
    assert (preflight(graph, info) == []) is fits


def test_rows_of_inputs_need_their_first_ones() -> None:
    template = {"input": {"required": {"image": ["IMAGE", {}]}}, "prefix": "image", "min": 2, "max": 5}
    info = {**NODE_INFO, "Batch": entry([], output_node=True, images=["COMFY_AUTOGROW_V3", {"template": template}])}
    picture = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}

    def judged(**inputs: Any) -> set[str]:
        graph = {"1": picture, "2": {"class_type": "Batch", "inputs": {f"images.{k}": v for k, v in inputs.items()}}}
        return {f"{problem.input_name}: {problem.code}" for problem in preflight(graph, info)}

    assert judged(image0=["1", 0], image1=["1", 0], image4=["1", 0]) == set()
    assert judged(image0=["1", 0]) == {"images.image1: input-missing"}
    assert judged(image0=["1", 0], image1=["1", 3]) == {"images.image1: bad-link"}


def test_slots_that_bring_inputs_of_their_own_bring_them_only_when_used() -> None:
    slot = ["COMFY_DYNAMICSLOT_V3", {"slotType": "IMAGE", "inputs": {"required": {"strength": ["FLOAT", {"max": 1}]}}}]
    names = [
        "COMFY_AUTOGROW_V3",
        {"template": {"input": {"required": {"v": ["INT", {}]}}, "names": ["a", "b"], "min": 1}},
    ]
    info = {"N": entry([], output_node=True, extra=slot, values=names)}

    def judged(**inputs: Any) -> set[str]:
        graph = {"1": {"class_type": "N", "inputs": {name.replace("__", "."): v for name, v in inputs.items()}}}
        return {f"{problem.input_name}: {problem.code}" for problem in preflight(graph, info)}

    assert judged(values__a=1) == set()
    assert judged(values__a=1, extra="x") == {"extra.strength: input-missing"}
    assert judged(values__a=1, extra="x", extra__strength=2) == {"extra.strength: value-too-large"}
    assert judged(values__b="no") == {"values.a: input-missing", "values.b: value-unreadable"}


def test_a_choice_behind_the_first_brings_its_own_inputs() -> None:
    picture = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}

    def judged(level: int) -> set[tuple[str, str]]:
        inputs = {"images": ["1", 0], "filename_prefix": "x", "format": "exr", "format.level": level}
        graph = {"1": picture, "2": {"class_type": "SaveImageAdvanced", "inputs": inputs}}
        return {(problem.input_name, problem.code) for problem in preflight(graph, NODE_INFO)}

    assert judged(9) == set()
    assert judged(10) == {("format.level", "value-too-large")}


@pytest.mark.parametrize(
    "template",
    [
        "of another kind",
        {"input": {"required": {"v": ["INT", {}]}}, "prefix": "v", "min": 1},
        {"input": {"required": {"v": ["INT", {}]}}, "names": "ab", "min": 1},
        {"input": ["v"], "names": ["a"], "min": 1},
        {"input": {"required": {}}, "names": ["a"], "min": 1},
        {"input": {"required": {"v": []}}, "names": ["a"], "min": 1},
    ],
)
def test_a_row_that_a_server_describes_in_words_unknown_to_us_is_left_to_the_server(template: Any) -> None:
    graph = {"1": {"class_type": "N", "inputs": {"values.a": "x", "y": "much"}}}
    info = {"N": entry([], output_node=True, values=["COMFY_AUTOGROW_V3", {"template": template}], y=["FLOAT", {}])}
    assert [problem.input_name for problem in preflight(graph, info)] == ["y"]


def test_a_row_of_optional_inputs_is_judged_where_no_required_one_is_described() -> None:
    template = {"input": {"required": {}, "optional": {"v": ["INT", {}]}}, "names": ["a", "b"], "min": 1}
    info = {"N": entry([], output_node=True, values=["COMFY_AUTOGROW_V3", {"template": template}])}
    graph = {"1": {"class_type": "N", "inputs": {"values.b": "no"}}}
    assert [(p.input_name, p.code) for p in preflight(graph, info)] == [("values.b", "value-unreadable")]


def test_an_input_that_is_listed_as_required_and_as_optional_is_required() -> None:
    info = {"N": entry([], output_node=True, optional={"x": ["INT", {}]}, x=["INT", {}])}
    graph: dict[str, Any] = {"1": {"class_type": "N", "inputs": {}}}
    assert [(p.input_name, p.code) for p in preflight(graph, info)] == [("x", "input-missing")]


def test_a_link_to_a_node_whose_outputs_the_server_does_not_list_is_left_to_the_server() -> None:
    graph = {"1": {"class_type": "S", "inputs": {}}, "2": {"class_type": "N", "inputs": {"x": ["1", 7]}}}
    info = {"S": {"input": {"required": {}}}, "N": entry([], output_node=True, x=["IMAGE"])}
    assert preflight(graph, info) == []


@pytest.mark.threat("S10")
def test_of_a_server_that_lists_inputs_without_end_only_so_many_are_looked_at() -> None:
    row = {"input": {"required": {"v": ["INT", {}]}}, "prefix": "v", "min": 10**9, "max": 10**9}
    rows = {name: ["COMFY_AUTOGROW_V3", {"template": row}] for name in "abc"}
    problems = preflight({"1": {"class_type": "N", "inputs": {}}}, {"N": entry([], output_node=True, **rows)})
    assert len(problems) == MAX_INPUTS
    assert {problem.code for problem in problems} == {"input-missing"}


def test_only_what_an_output_node_needs_is_judged() -> None:
    bad = {"class_type": "EmptyImage", "inputs": {}}
    good = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}}
    save = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0], "unknown": ["2", 0]}}
    assert preflight({"1": good, "2": bad, "3": save}, NODE_INFO) == []
    assert codes(preflight({"1": good}, NODE_INFO)) == {("", "no-output")}


def test_nodes_of_the_page_are_explained() -> None:
    graph = {"1": {"class_type": "Reroute", "inputs": {}}, "2": {"class_type": "Note", "inputs": {}}}
    hints = [problem.hint for problem in preflight(graph, NODE_INFO)]
    assert "Export (API)" in hints[0]
    assert "delete it" in hints[1]


@pytest.mark.threat("S15")
def test_control_characters_of_a_server_do_not_reach_the_terminal() -> None:
    problems = one([["\x1b[31mred\x07"]], "\x1b]0;title")
    assert problems
    assert not any(char in text for p in problems for text in (p.message, p.hint) for char in "\x1b\x07")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
junk = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
specs = junk | st.tuples(
    st.sampled_from(
        ["INT", "FLOAT", "STRING", "COMBO", "*", "COMFY_DYNAMICCOMBO_V3", "COMFY_AUTOGROW_V3", "COMFY_DYNAMICSLOT_V3"]
    )
    | st.lists(scalars, max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "min": junk,
            "max": junk,
            "options": junk | st.lists(st.fixed_dictionaries({"key": scalars, "inputs": junk}), max_size=2),
            "template": junk
            | st.fixed_dictionaries(
                {"input": junk}, optional={"names": junk, "prefix": junk, "min": junk, "max": junk}
            ),
            "inputs": junk,
            "multiselect": junk,
            "image_upload": junk,
        },
    ),
).map(list)
inputs_of = junk | st.dictionaries(st.sampled_from("xyz"), specs)
groups = junk | st.dictionaries(st.sampled_from(["required", "optional", "hidden"]), inputs_of)
output_flag = junk | st.just(value=True)
entries = junk | st.fixed_dictionaries({}, optional={"input": groups, "output": junk, "output_node": output_flag})


@pytest.mark.fault(13)
@given(st.dictionaries(st.sampled_from(["A", "B"]), entries), st.lists(junk, min_size=3, max_size=3))
@pytest.mark.threat("S10")
def test_no_node_list_whatsoever_makes_it_raise(info: dict[str, Any], values: list[Any]) -> None:
    graph = {
        "1": {"class_type": "A", "inputs": {"x": values[0], "y": values[1]}},
        "2": {"class_type": "B", "inputs": {"x": ["1", 0], "z": values[2]}},
    }
    for problem in preflight(graph, info):
        assert problem.code
        assert problem.message
    files_to_check(graph, info)
