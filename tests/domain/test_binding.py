"""What the user wants, put where it belongs: sidecars, guesses, seeds, `--set`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import workflows
from runcomfy.domain.binding import BoundWorkflow, Upload, bind, fit_seeds, into_range, parse_value
from runcomfy.domain.exceptions import (
    BadInput,
    TargetAmbiguous,
    TargetUnknown,
    ValueInvalid,
    WorkflowInvalid,
)
from runcomfy.domain.job import JobRequest, OutputKind
from runcomfy.domain.sidecar import Sidecar
from runcomfy.domain.workflow import Workflow, copy_json

Draw = Callable[[int, int], int]


def highest(_low: int, high: int) -> int:
    return high


def shipped(name: str) -> tuple[Workflow, Sidecar]:
    text, toml = workflows.load(name)
    assert toml is not None
    return Workflow.parse(text, name=name), Sidecar.parse(toml, name)


def flux(draw: Draw = highest, **request: Any) -> BoundWorkflow:
    asked = {"image": "render.png", "prompt": "a helmet", **request}
    return bind(*shipped("generate_flux_mesh"), JobRequest("generate_flux_mesh", **asked), random_int=draw)


def node(class_type: str, title: str = "", more: dict[str, Any] | None = None, **inputs: Any) -> dict[str, Any]:
    meta = {"_meta": {"title": title}} if title else {}
    return {"class_type": class_type, "inputs": {**inputs, **(more or {})}, **meta}


def plain(graph: dict[str, Any], draw: Draw = highest, **request: Any) -> BoundWorkflow:
    return bind(Workflow.parse(graph), None, JobRequest("x", **request), random_int=draw)


def value(bound: BoundWorkflow, place: str) -> Any:
    node_id, _, name = place.partition(".")
    return bound.graph[node_id]["inputs"][name]


# --- the shipped workflows ------------------------------------------------------------------------------------


def test_image_prompt_and_seeds_go_where_the_sidecar_says() -> None:
    bound = flux(seed=7)
    assert value(bound, "34.clip_l") == value(bound, "34.t5xxl") == "a helmet"
    assert value(bound, "19.clip_l") == ""
    assert bound.uploads == (Upload("16", "image", "render.png", "image"),)
    assert bound.seeds == {"3.noise_seed": 7, "32.seed": 7}
    assert [(item.name, item.node_id, item.kind, item.file_name, item.required) for item in bound.declared] == [
        ("flux", "24", OutputKind.IMAGE, "flux.png", True),
        ("mesh", "33", OutputKind.MESH, "mesh.glb", True),
    ]
    assert bound.declared[1].title == "EXPORTGLB"


def test_each_seed_is_drawn_from_its_own_range_and_always_reported() -> None:
    assert flux(draw=highest).seeds == {"3.noise_seed": 2**64 - 1, "32.seed": 2**31 - 1}
    assert flux(draw=lambda low, _: low).seeds == {"3.noise_seed": 0, "32.seed": 0}
    assert flux(draw=random.Random(1).randint).seeds != flux(draw=random.Random(2).randint).seeds


def test_a_given_seed_is_used_as_it_is_where_it_fits_and_mapped_where_it_does_not() -> None:
    assert flux(seed=2**31).seeds == {"3.noise_seed": 2**31, "32.seed": 0}
    assert flux(seed=2**40 + 5).seeds == {"3.noise_seed": 2**40 + 5, "32.seed": 5}
    assert flux(seed=-1).seeds == {"3.noise_seed": 2**64 - 1, "32.seed": 2**31 - 1}


def test_a_set_wins_over_everything_and_is_reported_if_it_is_a_seed() -> None:
    bound = flux(seed=7, sets={"32.seed": "11", "34.t5xxl": "only this one", "XlabsSampler.steps": 12})
    assert bound.seeds == {"3.noise_seed": 7, "32.seed": 11}
    assert value(bound, "34.clip_l") == "a helmet"
    assert value(bound, "34.t5xxl") == "only this one"
    assert value(bound, "3.steps") == 12
    assert [a.source for a in bound.applied if a.target == "34.t5xxl"] == ["--set 34.t5xxl"]


def test_the_sidecars_names_can_be_set_with_or_without_their_flags() -> None:
    bound = bind(
        *shipped("generate_flux_mesh"),
        JobRequest("x", sets={"image": "@in.png", "prompt": "cat", "steps": "30", "mesh_faces": 5000}),
        random_int=highest,
    )
    assert value(bound, "34.clip_l") == value(bound, "34.t5xxl") == "cat"
    assert value(bound, "3.steps") == 30
    assert value(bound, "32.target_num_faces") == 5000
    assert bound.uploads == (Upload("16", "image", "in.png", "image"),)


@pytest.mark.parametrize("steps", [0, "101", 1e9])
def test_a_named_number_outside_its_range_is_refused(steps: Any) -> None:
    with pytest.raises(ValueInvalid, match="1 to 100"):
        flux(sets={"steps": steps})


def test_missing_required_inputs_are_named_all_at_once() -> None:
    flow, sidecar = shipped("generate_flux_mesh")
    with pytest.raises(BadInput, match="generate_flux_mesh needs --image and --prompt") as caught:
        bind(flow, sidecar, JobRequest("x"), random_int=highest)
    assert caught.value.details == {"missing": ["image", "prompt"]}
    with pytest.raises(BadInput, match=r"needs --prompt$"):
        bind(flow, sidecar, JobRequest("x", image="a.png", sets={"34.clip_l": "half"}), random_int=highest)
    whole = {"34.clip_l": "x", "34.t5xxl": "x", "16.image": "@a.png"}
    assert bind(flow, sidecar, JobRequest("x", sets=whole), random_int=highest).uploads[0].path == "a.png"


def test_what_was_not_asked_for_stays_as_the_file_has_it() -> None:
    flow, _ = shipped("generate_flux_mesh")
    bound = flux(seed=1)
    changed = {
        f"{node_id}.{name}"
        for node_id, raw in flow.graph.items()
        for name, held in raw["inputs"].items()
        if bound.graph[node_id]["inputs"][name] != held
    }
    assert changed == {"16.image", "34.clip_l", "34.t5xxl", "3.noise_seed", "32.seed"}


def test_the_second_shipped_workflow_needs_an_image_only() -> None:
    bound = bind(*shipped("image_invert"), JobRequest("x", image="a.png"), random_int=highest)
    assert bound.seeds == {}
    assert bound.uploads == (Upload("1", "image", "a.png", "image"),)
    assert [item.file_name for item in bound.declared] == ["inverted.png"]


def test_uploads_get_the_names_that_the_server_gave() -> None:
    bound = flux(seed=1)
    [upload] = bound.uploads
    before = copy_json(bound.graph)
    graph = bound.with_uploads({upload: "sub/abc (1).png"})
    assert graph["16"]["inputs"]["image"] == "sub/abc (1).png"
    assert bound.graph == before
    with pytest.raises(ValueInvalid, match="was not uploaded"):
        bound.with_uploads({})


def test_the_hash_is_of_the_bound_graph() -> None:
    assert flux(seed=1).sha256 == flux(seed=1).sha256
    assert flux(seed=1).sha256 != flux(seed=2).sha256
    assert flux(seed=1).sha256 != shipped("generate_flux_mesh")[0].sha256


# --- without a sidecar ----------------------------------------------------------------------------------------

SDXL = {
    "4": node("CheckpointLoaderSimple", ckpt_name="sdxl.safetensors"),
    "5": node("LoadImage", image="pose.png"),
    "6": node("CLIPTextEncode", "Positive", text="old", clip=["4", 1]),
    "7": node("CLIPTextEncode", "Negative", text="blurry", clip=["4", 1]),
    "10": node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], image=["5", 0]),
    "3": node("KSampler", seed=42, steps=20, positive=["10", 0], negative=["10", 1]),
    "9": node("SaveImage", images=["3", 0], filename_prefix="x"),
}

FLUX_PRIMITIVES = {
    "4": node("DualCLIPLoader", clip_name1="a"),
    "34": node("CLIPTextEncodeFlux", clip_l=["40", 0], t5xxl=["41", 0], guidance=3.5, clip=["4", 0]),
    "40": node("PrimitiveStringMultiline", value=""),
    "41": node("PrimitiveStringMultiline", value=""),
    "42": node("PrimitiveInt", value=3),
    "7": node("ConditioningZeroOut", conditioning=["34", 0]),
    "22": node("KSampler", seed=["42", 0], positive=["34", 0], negative=["7", 0]),
}

GUIDER = {
    "6": node("CLIPTextEncode", text="old"),
    "26": node("FluxGuidance", conditioning=["6", 0], guidance=3.5),
    "22": node("BasicGuider", conditioning=["26", 0]),
    "25": node("RandomNoise", noise_seed=3),
    "13": node("SamplerCustomAdvanced", noise=["25", 0], guider=["22", 0]),
    "30": node("SaveText", text="unrelated"),
}


THROUGH_A_CHAIN = {
    "1": node("StringTrim", string="words", mode="both"),
    "2": node("StringPass", string=["1", 0]),
    "3": node("CLIPTextEncode", text=["2", 0]),
    "4": node("KSampler", positive=["3", 0]),
}

CONDITIONING_ONLY = {
    "1": node("TextEncodeQwenImageEdit", prompt="old"),
    "2": node("CLIPTextEncode", text="not reached"),
    "3": node("VendorPipe", conditioning=["1", 0], neg_conditioning=["2", 0]),
}


@pytest.mark.parametrize(
    ("graph", "places"),
    [
        (SDXL, ["6.text"]),
        (FLUX_PRIMITIVES, ["40.value", "41.value"]),
        (GUIDER, ["6.text"]),
        ({"1": node("CLIPTextEncode", text=""), "2": node("SaveText", text="")}, ["1.text"]),
        ({"1": node("PrimitiveString", value=""), "2": node("SaveText", text=["1", 0])}, ["1.value"]),
        (shipped("generate_flux_mesh")[0].graph, ["34.clip_l", "34.t5xxl"]),
        (THROUGH_A_CHAIN, ["1.string"]),
        (CONDITIONING_ONLY, ["1.prompt"]),
    ],
)
def test_a_prompt_finds_the_text_that_feeds_the_sampler(graph: dict[str, Any], places: list[str]) -> None:
    bound = plain(graph, prompt="new words")
    assert [a.target for a in bound.applied if a.source == "--prompt"] == places
    assert all(value(bound, place) == "new words" for place in places)


def test_a_prompt_with_two_homes_or_none_is_an_error_that_says_how_to_go_on() -> None:
    two = {"1": node("CLIPTextEncode", "A", text=""), "2": node("CLIPTextEncode", "B", text="")}
    with pytest.raises(TargetAmbiguous) as caught:
        plain(two, prompt="x")
    assert caught.value.details["candidates"] == ["1.text (A, CLIPTextEncode)", "2.text (B, CLIPTextEncode)"]
    assert "--set 1.text=" in caught.value.hint
    refiner = {**SDXL, "16": node("CLIPTextEncode", text=""), "13": node("KSampler", positive=["16", 0])}
    with pytest.raises(TargetAmbiguous):
        plain(refiner, prompt="x")
    forked = {
        "1": node("StringConcatenate", string_a="a", string_b="b"),
        "2": node("CLIPTextEncode", text=["1", 0]),
        "3": node("KSampler", positive=["2", 0]),
    }
    for graph in ({"1": node("LoadImage", image="a")}, forked):
        with pytest.raises(TargetUnknown, match="--prompt has nowhere to go"):
            plain(graph, prompt="x")


@pytest.mark.parametrize("name", ["positive", "conditioning"])
@pytest.mark.parametrize("sampler", ["KSampler", "CFGGuider"])
def test_the_text_of_a_sampler_wins_over_that_of_any_other_node(name: str, sampler: str) -> None:
    graph = {
        "1": node("Odd", more={name: ["3", 0]}),
        "2": node(sampler, more={name: ["4", 0]}),
        "3": node("CLIPTextEncode", text=""),
        "4": node("CLIPTextEncode", text=""),
    }
    assert value(plain(graph, prompt="cat"), "4.text") == "cat"
    graph["2"]["class_type"] = "Even"
    with pytest.raises(TargetAmbiguous) as caught:
        plain(graph, prompt="cat")
    assert caught.value.hint == "say which: --set 3.text=TEXT"


def test_a_text_that_is_made_of_several_gets_the_prompt_in_each() -> None:
    graph = {
        "1": node("KSampler", positive=["2", 0]),
        "2": node("CLIPTextEncode", text=["3", 0]),
        "3": node("StringConcatenate", string="a", text="b"),
    }
    bound = plain(graph, prompt="cat")
    assert value(bound, "3.string") == value(bound, "3.text") == "cat"
    graph["3"]["inputs"] = {"string": ["4", 0], "text": ["5", 0]}
    graph |= {"4": node("Line", value="a"), "5": node("Line", value="b")}
    bound = plain(graph, prompt="cat")
    assert value(bound, "4.value") == value(bound, "5.value") == "cat"


@pytest.mark.parametrize(
    ("graph", "place"),
    [
        (SDXL, ("5", "image")),
        ({"1": node("LoadImage", image="a"), "2": node("SaveGLB", image="")}, ("1", "image")),
        ({"1": node("LoadImage", image="a"), "2": node("LoadImageMask", image="a")}, ("1", "image")),
        ({"1": node("LoadImageOutput", image="a")}, ("1", "image")),
        ({"1": node("VendorPictureReader", image="a"), "2": node("Resize", image=["1", 0])}, ("1", "image")),
    ],
)
def test_an_image_finds_the_node_that_loads_one(graph: dict[str, Any], place: tuple[str, str]) -> None:
    assert plain(graph, image="my.png").uploads == (Upload(*place, "my.png", "image"),)


def test_an_image_with_two_homes_or_none_is_an_error_that_says_how_to_go_on() -> None:
    with pytest.raises(TargetAmbiguous) as caught:
        plain({"1": node("LoadImage", image="a"), "2": node("LoadImage", image="b")}, image="x.png")
    assert caught.value.hint == "say which: --set 1.image=@path/to/file"
    assert caught.value.details == {"candidates": ["1.image (LoadImage, LoadImage)", "2.image (LoadImage, LoadImage)"]}
    with pytest.raises(TargetUnknown, match="--image has nowhere to go"):
        plain({"1": node("EmptyImage", width=8)}, image="x.png")


def test_seeds_without_a_sidecar_are_found_by_name_and_links_left_alone() -> None:
    graph = {
        "1": node("KSampler", seed=5),
        "2": node("RandomNoise", noise_seed=5),
        "3": node("New", more={"mode": "a", "mode.seed": 5}),
        "4": node("KSampler", seed=["1", 0]),
        "5": node("Text", seed="five"),
    }
    bound = plain(graph)
    assert bound.seeds == {"1.seed": 2**32 - 1, "2.noise_seed": 2**32 - 1, "3.mode.seed": 2**32 - 1}
    assert value(bound, "4.seed") == ["1", 0]
    assert plain(graph, seed=2**40).seeds["1.seed"] == 2**40
    assert plain(graph, sets={"1.seed": 9}).seeds["1.seed"] == 9
    assert "1.seed" not in plain(graph, sets={"1.seed": '["2", 0]'}).seeds


def test_seeds_of_unstated_range_are_moved_into_the_machines_own() -> None:
    graph = {"1": node("KSampler", seed=5), "2": node("Small", seed=5), "3": node("Odd", seed=5)}
    info = {
        "KSampler": {"input": {"required": {"seed": ["INT", {"min": 0, "max": 2**64 - 1}]}}},
        "Small": {"input": {"optional": {"seed": ["INT", {"min": 1, "max": 10}]}}},
        "Odd": {"input": {"required": {"seed": ["INT", {"min": "a", "max": []}]}}},
    }
    bound = plain(graph, draw=lambda _low, _high: 4_000_000_000)
    fitted = fit_seeds(bound, info)
    assert fitted.seeds == {"1.seed": 4_000_000_000, "2.seed": 10, "3.seed": 4_000_000_000}
    assert value(fitted, "2.seed") == 10
    assert [a.value for a in fitted.applied if a.target == "2.seed"] == [10]
    assert value(bound, "2.seed") == 4_000_000_000
    # What the user set stays: out of range is for preflight to say.
    assert fit_seeds(plain(graph, sets={"2.seed": 99}), info).seeds["2.seed"] == 99
    assert fit_seeds(flux(), info) == flux()
    seed: dict[str, Any] = {"seed": 3}
    oddities: list[dict[str, Any]] = [
        {},
        {"Small": None},
        {"Small": {"input": []}},
        {"Small": {"input": {"required": seed}}},
    ]
    for strange in oddities:
        assert fit_seeds(bound, strange) == bound


# --- values ---------------------------------------------------------------------------------------------------

GRAPH = {"1": node("A", x=1), "4": node("B", text="words", n=3, y=["1", 0], flag=True)}


@pytest.mark.parametrize(
    ("text", "current", "meant"),
    [
        ("20", 3, 20),
        ("20", None, 20),
        ("-1.5e3", 3, -1500.0),
        ("true", True, True),
        ("null", 3, None),
        ("plain words", 3, "plain words"),
        ("20", "words", "20"),
        ("true", "words", "true"),
        ("null", "words", "null"),
        ("[1, 2]", "words", "[1, 2]"),
        ('{"a": 1}', "words", '{"a": 1}'),
        ('"20"', 3, "20"),
        ('"quoted"', "words", "quoted"),
        ("[1, 2]", 3, {"__value__": [1, 2]}),
        ("[]", 3, {"__value__": []}),
        ('["1", 0]', "words", ["1", 0]),
        ('["1", 0]', 3, ["1", 0]),
        ('["9", 0]', 3, {"__value__": ["9", 0]}),
        ('{"a": [1]}', 3, {"a": [1]}),
        ("NaN", "words", "NaN"),
        ("NaN is not a number", 3, "NaN is not a number"),
        ("@@home", 3, "@home"),
        ("", 3, ""),
        ("[" * 100_000, "words", "[" * 100_000),
    ],
)
def test_a_text_means_json_unless_the_input_holds_text(text: str, current: Any, meant: Any) -> None:
    found = parse_value(text, current, GRAPH)
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", "[NaN]", "1e999", '{"a": NaN}', "[" * 600 + "]" * 600]
)
def test_numbers_that_json_does_not_know_are_refused(text: str) -> None:
    with pytest.raises(ValueInvalid, match="finite"):
        parse_value(text, 3, GRAPH)


@pytest.mark.parametrize(
    "bad", [float("nan"), pytest.param(10**5000, id="huge"), [float("inf")], object(), {"a": {1, 2}}]
)
def test_values_from_programs_are_held_to_the_same(bad: Any) -> None:
    with pytest.raises(ValueInvalid):
        plain(GRAPH, sets={"4.n": bad})


def test_files_links_lists_and_new_inputs_can_be_set() -> None:
    bound = plain(
        {**GRAPH, "7": node("LoadImage", image="a.png"), "8": node("Load3D", model_file="m.glb")},
        sets={
            "7.image": "@~/my pictures/ä.png",
            "8.model_file": "@mesh.glb",
            "4.text": "@@handle",
            "+4.extra": "[1, 2]",
            "4.n": ["1", 0],
            "4.flag": False,
        },
    )
    assert bound.uploads == (
        Upload("7", "image", "~/my pictures/ä.png", "image"),
        Upload("8", "model_file", "mesh.glb", "file"),
    )
    assert bound.waiting == {("7", "image"), ("8", "model_file")}
    assert value(bound, "4.text") == "@handle"
    assert value(bound, "4.extra") == {"__value__": [1, 2]}
    assert value(bound, "4.n") == ["1", 0]
    assert value(bound, "4.flag") is False
    with pytest.raises(ValueInvalid, match="no file is named"):
        plain(GRAPH, sets={"4.text": "@"})


def test_a_set_replaces_the_upload_that_a_flag_asked_for() -> None:
    bound = plain({"7": node("LoadImage", image="a.png")}, image="one.png", sets={"7.image": "already-there.png"})
    assert bound.uploads == ()
    assert value(bound, "7.image") == "already-there.png"


@pytest.mark.parametrize("link", ['["4", 0]', '["1", 0]'])
def test_links_that_would_go_in_a_circle_are_refused(link: str) -> None:
    with pytest.raises(WorkflowInvalid, match="in a circle"):
        plain(GRAPH, sets={"1.x": link})


def test_a_flag_whose_place_is_taken_by_a_link_says_so() -> None:
    sidecar = Sidecar.parse('[inputs.prompt]\nkind = "text"\ntargets = ["4.y"]\nrequired = true')
    with pytest.raises(ValueInvalid, match="another node"):
        bind(Workflow.parse(GRAPH), sidecar, JobRequest("x", prompt="p"), random_int=highest)


def test_defaults_of_the_sidecar_hold_until_the_user_says_otherwise() -> None:
    sidecar = Sidecar.parse(
        '[inputs.count]\nkind = "number"\ntargets = ["4.n"]\n[defaults]\ncount = 8\n"4.text" = "hello"'
    )
    flow = Workflow.parse(GRAPH)
    untouched = bind(flow, sidecar, JobRequest("x"), random_int=highest)
    assert (value(untouched, "4.n"), value(untouched, "4.text")) == (8, "hello")
    assert {a.source for a in untouched.applied} == {"default"}
    assert value(bind(flow, sidecar, JobRequest("x", sets={"count": "2"}), random_int=highest), "4.n") == 2


def test_a_mistyped_name_of_the_sidecar_is_recognised() -> None:
    with pytest.raises(TargetUnknown, match="setps") as caught:
        flux(sets={"setps": 3})
    assert "steps" in caught.value.hint


# --- sidecars -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("a = ", "is not TOML"),
        (b"\xff\xff", "is not TOML"),
        ("input = 3", "input is not a key"),
        ("[inputs]\nimage = 3", "not a table of tables"),
        ('[inputs.image]\ntargets = ["1.x"]', "has no kind"),
        ('[inputs.image]\nkind = "picture"\ntargets = ["1.x"]', "'picture' is unknown"),
        ('[inputs.image]\nkind = "image"', "has no targets"),
        ('[inputs.image]\nkind = "image"\ntargets = "1.x"', "not a list of texts"),
        ('[inputs.image]\nkind = "image"\ntarget = ["1.x"]', "inputs.image.target is not a key"),
        ('[inputs.image]\nkind = "image"\ntargets = ["1.x"]\nrequired = 1', "not true or false"),
        ('[inputs.n]\nkind = "number"\ntargets = ["1.x"]\nminimum = "0"', "is not a number"),
        ('[inputs.n]\nkind = "number"\ntargets = ["1.x"]\nmaximum = nan', "is not a number"),
        ('[seeds."1.x"]\nmaximum = 1.5', "whole number"),
        ('[seeds."1.x"]\nmaximum = "18446744073709551616"', "whole number"),
        ('[seeds."1.x"]\nmaximum = "many"', "whole number"),
        ('[seeds."1.x"]\nminimum = 9\nmaximum = 1', "larger than maximum"),
        ('[outputs.a]\nkind = "image"', "has no node"),
        ('[outputs.a]\nnode = "1"\nkind = "png"', "'png' is unknown"),
        ('[outputs.a]\nnode = "1"\nkind = "image"\nfile = "../x.png"', "not a plain file name"),
        ('[outputs.a]\nnode = "1"\nkind = "image"\nfile = "C:x.png"', "not a plain file name"),
        ("[defaults]\nx = [1]", "neither a text nor a number"),
        ("defaults = 3", "not a table"),
        ("models = 3", "not a list of tables"),
        ("[[models]]\nname = 1", "models.name is not a key"),
        ("[[models]]\nfolder = 'x'", "has no file"),
        ("[[packs]]\nurl = 'x'", "has no name"),
        ("description = 3", "is not a text"),
    ],
)
def test_a_sidecar_that_is_not_right_is_refused_by_what_is_wrong(toml: str | bytes, said: str) -> None:
    with pytest.raises(WorkflowInvalid, match=said) as caught:
        Sidecar.parse(toml, "mine")
    assert caught.value.hint
    assert "mine" in caught.value.message


@pytest.mark.parametrize("name", workflows.names())
def test_the_shipped_sidecars_fit_their_graphs(name: str) -> None:
    flow, sidecar = shipped(name)
    sidecar.check(flow)
    assert sidecar.description
    pack_classes = {cls for pack in sidecar.packs for cls in pack.classes}
    assert pack_classes <= flow.class_types
    literals = {str(held) for n in flow.nodes.values() for held in n.inputs.values()}
    assert {m.file for m in sidecar.models if not m.note} <= literals


@pytest.mark.parametrize(
    "toml",
    [
        '[inputs.image]\nkind = "image"\ntargets = ["99.image"]',
        '[seeds."4.sed"]',
        '[outputs.a]\nnode = "99"\nkind = "image"',
        '[defaults]\n"99.x" = 1',
    ],
)
def test_a_sidecar_that_fell_behind_its_graph_is_noticed(toml: str) -> None:
    with pytest.raises(WorkflowInvalid, match="the sidecar of mine"):
        Sidecar.parse(toml, "mine").check(Workflow.parse(GRAPH))


# --- for all graphs -------------------------------------------------------------------------------------------

names = st.text(min_size=1, max_size=5)
literals = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
values = literals | st.text(max_size=8) | st.lists(literals, max_size=3) | st.dictionaries(names, literals, max_size=2)
graphs = st.dictionaries(
    names,
    st.fixed_dictionaries(
        {"class_type": names, "inputs": st.dictionaries(names, literals | st.text(max_size=8), max_size=4)},
        optional={"_meta": st.fixed_dictionaries({"title": names})},
    ),
    min_size=1,
    max_size=5,
).filter(lambda graph: "prompt" not in graph)


@given(graphs, st.data())
def test_bound_values_are_found_where_they_were_asked_for_and_nothing_else_moves(
    graph: dict[str, Any], data: st.DataObject
) -> None:
    before = copy_json(graph)
    flow = Workflow.parse(graph)
    places = {(node_id, name) for node_id, raw in graph.items() for name in raw["inputs"]}
    sets: dict[str, Any] = {}
    expected: dict[tuple[str, str], Any] = {}
    for node_id, name in sorted(places):
        target = f"{node_id}.{name}"
        try:
            place = flow.resolve(target)
        except TargetAmbiguous:
            continue
        if place in expected or not data.draw(st.booleans()):
            continue
        wanted = data.draw(values)
        sets[target] = wanted if not isinstance(wanted, str) else f"@@{wanted}"
        expected[place] = {"__value__": wanted} if isinstance(wanted, list) else wanted
        if isinstance(wanted, str):
            expected[place] = f"@{wanted}"

    bound = plain(graph, draw=lambda _low, high: high, sets=sets)

    assert graph == before == flow.graph
    for target, wanted in sets.items():
        node_id, name = flow.resolve(target)
        assert bound.graph[node_id]["inputs"][name] == expected[node_id, name], (target, wanted)
    for node_id, name in places - set(expected):
        held = graph[node_id]["inputs"][name]
        is_seed = name.rpartition(".")[2] in ("seed", "noise_seed") and type(held) is int
        assert is_seed or bound.graph[node_id]["inputs"][name] == held
    assert {node_id: set(raw["inputs"]) for node_id, raw in bound.graph.items()} == {
        node_id: set(raw["inputs"]) for node_id, raw in graph.items()
    }


@given(st.text(max_size=20), st.none() | st.text(max_size=3) | st.integers())
def test_any_text_means_something_or_is_refused(text: str, current: Any) -> None:
    try:
        meant = parse_value(text, current, GRAPH)
    except ValueInvalid:
        return
    if isinstance(current, str):
        assert isinstance(meant, (str, list))


@given(st.integers(-(2**70), 2**70), st.integers(0, 100), st.integers(0, 2**64))
def test_any_seed_lands_in_any_range_and_stays_if_it_is_there(seed: int, minimum: int, width: int) -> None:
    mapped = into_range(seed, minimum, minimum + width)
    assert minimum <= mapped <= minimum + width
    assert into_range(mapped, minimum, minimum + width) == mapped
    if minimum <= seed <= minimum + width:
        assert mapped == seed
