"""Names of job files: by the project's list, the sidecar, the node, or the only input of that name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import workflows
from runcomfy.domain.binding import BoundWorkflow, Upload, bind
from runcomfy.domain.exceptions import BadInput, RunComfyError, TargetAmbiguous, TargetUnknown, ValueInvalid
from runcomfy.domain.job import JobRequest
from runcomfy.domain.sidecar import Sidecar
from runcomfy.domain.workflow import Workflow


def node(class_type: str, title: str = "", **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, **({"_meta": {"title": title}} if title else {})}


GRAPH = {
    "3": node("KSampler", "The sampler", seed=1, steps=20, cfg=7.0, sampler_name="euler", positive=["6", 0],
              negative=["7", 0], latent_image=["5", 0]),
    "5": node("EmptyLatentImage", width=512, height=512, batch_size=1),
    "6": node("CLIPTextEncode", "Positive", text="a cat"),
    "7": node("CLIPTextEncode", "Negative", text="blurry"),
    "9": node("SaveImage", images=["3", 0], filename_prefix="out"),
    "lo_ader_1": node("LoadImage", "Start", image="example.png"),
    "lo": node("Odd", ader_1_image="x", strength=0.5),
    "31": node("Refine", "Fine. Tuning", noise_seed=5, steps_after=3, image=["lo_ader_1", 0]),
}  # fmt: skip


def bound(inputs: dict[str, Any], graph: dict[str, Any] | None = None, **more: Any) -> BoundWorkflow:
    files = more.pop("files", ())
    toml = more.pop("toml", None)
    request = JobRequest("x", inputs=inputs, **more)
    sidecar = Sidecar.parse(toml) if toml else None
    return bind(Workflow.parse(graph or GRAPH), sidecar, request, random_int=lambda low, _: low, files=files)


def value(result: BoundWorkflow, place: str) -> Any:
    node_id, _, name = place.rpartition(".")
    return result.graph[node_id]["inputs"][name]


@pytest.mark.parametrize(
    ("name", "given", "place", "expected"),
    [
        ("31_noise_seed", 7, "31.noise_seed", 7),
        ("3_seed", 99, "3.seed", 99),
        ("6_text", "a dog", "6.text", "a dog"),
        ("lo_ader_1_image", "other.png", "lo_ader_1.image", "other.png"),
        ("lo_strength", 0.25, "lo.strength", 0.25),
        ("The sampler.steps", 30, "3.steps", 30),
        ("3.cfg", 4, "3.cfg", 4),
        ("Fine. Tuning.noise_seed", 8, "31.noise_seed", 8),
        ("KSampler.sampler_name", "ddim", "3.sampler_name", "ddim"),
        ("steps", 30, "3.steps", 30),
        ("steps", "30", "3.steps", 30),
        ("width", 768, "5.width", 768),
        ("prompt", "a knight", "6.text", "a knight"),
        ("prompt", "@artist, 42", "6.text", "@artist, 42"),
        ("6_text", '["3", 0]', "6.text", '["3", 0]'),
        ("6_text", "42", "6.text", "42"),
        ("filename_prefix", "true", "9.filename_prefix", "true"),
        ("image", "on-the-server.png", "lo_ader_1.image", "on-the-server.png"),
        ("seed", 5, "3.seed", 5),
        ("6_text", ["31", 0], "6.text", ["31", 0]),
        ("31_image", ["lo_ader_1", 0], "31.image", ["lo_ader_1", 0]),
    ],
)
def test_a_name_finds_its_input(name: str, given: Any, place: str, expected: Any) -> None:
    graph = {key: entry for key, entry in GRAPH.items() if not (name == "lo_ader_1_image" and key == "lo")}
    result = bound({name: given}, graph)
    assert value(result, place) == expected
    assert [item.target for item in result.applied if item.source == f"inputs.{name}"] == [place]


def test_an_id_with_underscores_is_split_in_every_way_and_a_doubt_is_told() -> None:
    with pytest.raises(TargetAmbiguous) as caught:
        bound({"lo_ader_1_image": "x.png"})
    assert caught.value.details["candidates"] == ["lo_ader_1_image (Odd, Odd)", "lo_ader_1_image (Start, LoadImage)"]


@pytest.mark.parametrize(
    ("name", "error", "words", "candidates"),
    [
        ("text", TargetAmbiguous, "2 inputs", ["6_text", "7_text"]),
        ("stps", TargetUnknown, "did you mean steps", ["3_steps", "5_width", "6_text"]),
        ("31_nothing", TargetUnknown, "Its inputs", ["31_noise_seed"]),
        ("99_text", TargetUnknown, "text", ["6_text"]),
        ("Nobody.text", TargetUnknown, "Its inputs", ["6_text"]),
        ("images", TargetUnknown, "Its inputs", ["9_filename_prefix"]),
        ("", TargetUnknown, "Its inputs", ["3_seed"]),
    ],
)
def test_a_name_nobody_knows_or_several_have_lists_what_could_be_meant(
    name: str, error: type[RunComfyError], words: str, candidates: list[str]
) -> None:
    with pytest.raises(error) as caught:
        bound({name: "x"})
    said = f"{caught.value.message} {caught.value.hint}"
    assert words in said
    for candidate in candidates:
        assert any(shown.startswith(candidate) for shown in caught.value.details["candidates"])
        assert candidate in said


def test_a_seed_that_several_samplers_have_is_a_doubt_and_one_by_another_name_is_not() -> None:
    two = {**GRAPH, "4": node("KSampler", seed=2, latent_image=["5", 0])}
    with pytest.raises(TargetAmbiguous) as caught:
        bound({"seed": 1}, two)
    assert [c.split(" (")[0] for c in caught.value.details["candidates"]] == ["3_seed", "4_seed"]
    one = {"31": GRAPH["31"], "lo_ader_1": GRAPH["lo_ader_1"]}
    assert value(bound({"seed": 77}, one), "31.noise_seed") == 77


def test_a_prompt_that_could_go_anywhere_lists_where() -> None:
    graph = {"1": node("CLIPTextEncode", text="a"), "2": node("CLIPTextEncode", text="b")}
    with pytest.raises(TargetAmbiguous) as caught:
        bound({"prompt": "x"}, graph)
    assert "1.text" in caught.value.message
    assert "2.text" in caught.value.message
    with pytest.raises(TargetUnknown, match="no input that 'prompt' could mean"):
        bound({"prompt": "x"}, {"5": GRAPH["5"]})


# --- the project's list and the sidecar -------------------------------------------------------------------

TOML = """
[inputs.prompt]
kind = "text"
targets = ["6.text"]
required = true
[inputs.quality]
kind = "number"
targets = ["3.steps"]
minimum = 1
maximum = 50
[inputs.start]
kind = "image"
targets = ["lo_ader_1.image"]
[seeds."3.seed"]
maximum = 1000
[seeds."31.noise_seed"]
maximum = 10
"""


def test_the_projects_list_counts_before_the_sidecar_and_that_before_the_graph() -> None:
    names = {"prompt": "7.text", "better": "quality"}
    result = bound({"prompt": "x", "better": 9}, toml=TOML.replace("required = true", ""), input_names=names)
    assert (value(result, "6.text"), value(result, "7.text"), value(result, "3.steps")) == ("a cat", "x", 9)
    result = bound({"prompt": "x", "quality": 7}, toml=TOML)
    assert (value(result, "6.text"), value(result, "3.steps")) == ("x", 7)


def test_the_seed_goes_to_every_seed_of_the_sidecar_each_within_its_range() -> None:
    result = bound({"prompt": "x", "seed": 1234}, toml=TOML)
    assert result.seeds == {"3.seed": 1234 % 1001, "31.noise_seed": 1234 % 11}
    assert bound({"prompt": "x", "seed": "12"}, toml=TOML).seeds == {"3.seed": 12, "31.noise_seed": 1}
    with pytest.raises(ValueInvalid, match="not a whole number"):
        bound({"prompt": "x", "seed": "many"}, toml=TOML)


def test_a_named_number_keeps_to_its_limits() -> None:
    with pytest.raises(ValueInvalid, match="quality = 51 is outside 1 to 50"):
        bound({"prompt": "x", "quality": 51}, toml=TOML)


def test_what_the_list_names_must_be_in_the_graph() -> None:
    with pytest.raises(TargetUnknown):
        bound({"prompt": "x"}, input_names={"prompt": "66.text"})


def test_what_is_required_is_named_as_the_job_file_would() -> None:
    with pytest.raises(BadInput, match="needs prompt"):
        bound({"quality": 3}, toml=TOML)


@pytest.mark.parametrize(
    ("inputs", "missing"),
    [
        ({"prompt": "x", "seed": 1, "steps": 2}, []),
        ({"6_text": "x", "3_seed": 1, "3_steps": 2}, []),
        ({"Positive.text": "x", "3.seed": 1}, ["steps"]),
        ({"positive_prompt": "x", "seed": 1}, ["steps"]),
        ({"prompt": None, "seed": 1, "steps": 2}, ["prompt"]),
        ({}, ["prompt", "seed", "steps"]),
    ],
)
def test_required_inputs_that_are_missing_are_all_named(inputs: dict[str, Any], missing: list[str]) -> None:
    request: dict[str, Any] = {
        "required_inputs": ("prompt", "seed", "steps"),
        "input_names": {"positive_prompt": "6.text"},
    }
    if not missing:
        bound(inputs, **request)
        return
    with pytest.raises(ValueInvalid) as caught:
        bound(inputs, **request)
    assert caught.value.details["missing"] == missing
    assert ", ".join(missing) in caught.value.message


def test_options_of_the_command_line_count_as_given() -> None:
    bound({}, required_inputs=("prompt", "seed"), prompt="x", seed=1)


def test_a_name_without_a_value_is_left_as_the_file_has_it() -> None:
    assert value(bound({"steps": None, "nobody knows": None}), "3.steps") == 20


# --- files ------------------------------------------------------------------------------------------------


def test_a_local_file_is_uploaded_where_an_input_takes_a_file_and_nowhere_else() -> None:
    here = "/pictures/start.png"
    result = bound({"image": here, "filename_prefix": here, "prompt": here}, files={here})
    assert result.uploads == (Upload("lo_ader_1", "image", here, "image"),)
    assert (value(result, "9.filename_prefix"), value(result, "6.text")) == (here, here)
    assert bound({"start": here, "prompt": "x"}, toml=TOML, files={here}).uploads[0].path == here
    assert bound({"image": here}).uploads == ()
    assert value(bound({"image": here}), "lo_ader_1.image") == here


def test_an_at_sign_uploads_and_two_are_one() -> None:
    result = bound({"image": "@/x/y.png", "filename_prefix": "@@home"})
    assert result.uploads == (Upload("lo_ader_1", "image", "/x/y.png", "image"),)
    assert value(result, "9.filename_prefix") == "@home"


def test_a_given_seed_is_not_drawn_over_and_the_command_line_has_the_last_word() -> None:
    result = bound({"seed": 8}, sets={"3.seed": 9})
    assert result.seeds["3.seed"] == 9
    assert bound({"3_seed": 8}).seeds == {"3.seed": 8, "31.noise_seed": 0}


def test_the_onboarding_guides_own_job_binds() -> None:
    text, toml = workflows.load("wf_realistic_portrait")
    assert toml is not None
    inputs = {"prompt": "Ultra-realistic portrait of a medieval knight in rain", "seed": 123456, "steps": 30}
    request = JobRequest("wf_realistic_portrait", inputs=inputs, required_inputs=("prompt", "seed", "steps"))
    for sidecar in (Sidecar.parse(toml), None):
        result = bind(Workflow.parse(text), sidecar, request, random_int=lambda low, _: low)
        assert result.seeds == {"3.seed": 123456}
        assert value(result, "3.steps") == 30
        assert value(result, "6.text") == inputs["prompt"]


@given(st.dictionaries(st.text(max_size=20), st.one_of(st.text(max_size=10), st.integers(), st.none()), max_size=4))
def test_any_names_are_bound_or_refused_with_words(inputs: dict[str, Any]) -> None:
    refused: BadInput | None = None
    try:
        bound(inputs)
    except BadInput as error:
        refused = error
    if refused is not None:
        assert refused.message.isprintable()
        assert refused.hint.isprintable()
