"""Reading graphs, and finding in them what people name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import workflows
from runcomfy.domain.exceptions import (
    BadInput,
    RunComfyError,
    TargetAmbiguous,
    TargetUnknown,
    WorkflowInvalid,
    WorkflowIsUiFormat,
    WorkflowNotJson,
)
from runcomfy.domain.workflow import MAX_BYTES, Workflow, close_matches, copy_json


def node(class_type: str, title: str = "", more: dict[str, Any] | None = None, **inputs: Any) -> dict[str, Any]:
    meta = {"_meta": {"title": title}} if title else {}
    return {"class_type": class_type, "inputs": {**inputs, **(more or {})}, **meta}


GRAPH = {
    "1": node("LoadImage", "My.Picture", image="a.png"),
    "1.5": node("LoadImage", image="b.png"),
    "größe: 2": node("ImageScale", "Scale it", image=["1", 0], width=8),
    "7": node("KSampler", "KSampler", seed=1),
    "8": node("KSampler", "Refiner", seed=2, steps=3),
    "9": node("SaveImageAdvanced", more={"images": ["größe: 2", 0], "format": "png", "format.bit_depth": "8-bit"}),
}


# --- reading --------------------------------------------------------------------------------------------------


def test_the_shipped_workflow_is_read_with_titles_links_and_classes() -> None:
    text, _ = workflows.load("generate_flux_mesh")
    flow = Workflow.parse(text, name="generate_flux_mesh")
    assert len(flow.nodes) == 18
    assert len(flow.links) == 18
    assert flow.title("16") == "INPUTIMAGE"
    assert flow.title("37") == "🔧 Image Remove Background"
    assert "XlabsSampler" in flow.class_types
    assert flow.value("3", "steps") == 20
    assert flow.value("3", "nothing") is None


def test_text_bytes_object_and_request_body_are_the_same_graph() -> None:
    text = json.dumps(GRAPH)
    body = json.dumps({"prompt": GRAPH, "client_id": "x", "extra_data": {"extra_pnginfo": {}}})
    forms: list[Any] = [text, text.encode(), b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"), GRAPH, body]
    hashes = {Workflow.parse(form).sha256 for form in forms}
    assert len(hashes) == 1
    assert all(Workflow.parse(form).graph == GRAPH for form in forms)


def test_the_hash_knows_no_spaces_or_key_order_but_every_value() -> None:
    turned = dict(reversed(GRAPH.items()))
    assert Workflow.parse(json.dumps(turned, indent=4)).sha256 == Workflow.parse(GRAPH).sha256
    changed = copy_json(GRAPH)
    changed["7"]["inputs"]["seed"] = 2
    assert Workflow.parse(changed).sha256 != Workflow.parse(GRAPH).sha256


def test_a_node_called_prompt_is_not_a_request_body() -> None:
    assert Workflow.parse({"prompt": node("SaveText", text="x")}).class_types == {"SaveText"}


def test_parsing_copies_so_that_later_changes_of_the_callers_object_do_not_show() -> None:
    mine = copy_json(GRAPH)
    flow = Workflow.parse(mine)
    mine["7"]["inputs"]["seed"] = 99
    assert flow.value("7", "seed") == 1


def test_broken_json_is_told_with_line_and_column() -> None:
    with pytest.raises(WorkflowNotJson, match="line 2, column 10") as caught:
        Workflow.parse('{\n  "1": { oops }\n}', name="mine.json")
    assert caught.value.details == {"line": 2, "column": 10}
    assert "mine.json" in caught.value.message


@pytest.mark.parametrize(
    "data", ["", "   ", "{", b"\xff\xfa\x00", b"\x89PNG\r\n\x1a\n....", '{"1": NaN}', "[1" + "0" * 5000 + "]"]
)
def test_what_is_not_json_is_refused_with_what_to_do(data: str | bytes) -> None:
    with pytest.raises(WorkflowNotJson) as caught:
        Workflow.parse(data)
    assert caught.value.hint


@pytest.mark.parametrize(
    "data",
    [
        {"last_node_id": 2, "nodes": [], "links": [], "version": 0.4},
        {"nodes": [{"id": 1, "type": "LoadImage"}], "links": [[1, 1, 0, 2, 0, "IMAGE"]]},
        {"prompt": {"nodes": [], "links": []}},
    ],
)
def test_a_file_saved_for_the_page_is_refused_with_what_to_do(data: dict[str, Any]) -> None:
    with pytest.raises(WorkflowIsUiFormat) as caught:
        Workflow.parse(json.dumps(data))
    assert "Export (API)" in caught.value.hint
    assert "Save (API Format)" in caught.value.hint


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "a list"),
        ("null", "null"),
        ("3", "a number"),
        ({}, "no nodes"),
        ({"1": "hello"}, "is a text, not an object"),
        ({"1": {"inputs": {}}}, "no class_type"),
        ({"1": {"class_type": "", "inputs": {}}}, "no class_type"),
        ({"1": {"class_type": "A"}}, "has no inputs"),
        ({"1": {"class_type": "A", "inputs": []}}, "has a list as inputs"),
        ({"1": node("A", x=["1", 0, 3])}, "is a list of 3"),
        ({"1": node("A", x=[])}, "is a list of 0"),
        ({"1": node("A"), "2": node("B", x=[1, 0])}, "node ids are texts"),
        ({"2": node("B", x=["99", 0])}, "'99', which is not in the graph"),
        ({"1": node("A"), "2": node("B", x=["1", "0"])}, "whole numbers"),
        ({"1": node("A", x=["1", 0])}, "1 -> 1"),
        ({"1": node("A", x=["2", 0]), "2": node("A", x=["3", 0]), "3": node("A", x=["1", 0])}, "in a circle"),
        ({3: node("A")}, "names and node ids are texts"),
        ({"1": node("A", x=float("inf"))}, "not finite"),
        ({"1": node("A", x=10**400)}, "hundreds of digits"),
        ({"1": node("A", x=object())}, "JSON cannot express"),
        ('{"1": {"class_type": "A", "inputs": {"x": 1e999}}}', "not finite"),
    ],
)
def test_json_that_is_no_graph_is_refused_by_what_is_wrong(data: Any, said: str) -> None:
    with pytest.raises(WorkflowInvalid, match=said) as caught:
        Workflow.parse(json.dumps(data) if isinstance(data, list) else data)
    assert caught.value.hint


def test_a_list_meant_as_a_value_is_no_link() -> None:
    flow = Workflow.parse({"1": node("A", x={"__value__": ["2", 0, 5]})})
    assert flow.links == ()


@pytest.mark.fault(48)
@pytest.mark.parametrize("depth", [200, 5_000, 1_000_000])
def test_hostile_nesting_ends_in_our_error_not_in_a_stack_overflow(depth: int) -> None:
    with pytest.raises(BadInput):
        Workflow.parse('{"1": {"class_type": "A", "inputs": {"x": ' + "[" * depth + "]" * depth + "}}}")
    deep: Any = {}
    for _ in range(min(depth, 5_000)):
        deep = {"x": deep}
    with pytest.raises(WorkflowInvalid, match="nested too deeply"):
        Workflow.parse(deep)


def test_a_file_of_more_than_fifty_megabytes_is_not_even_read() -> None:
    with pytest.raises(WorkflowInvalid, match="50 MB"):
        Workflow.parse(b" " * (MAX_BYTES + 1))


def test_a_long_chain_of_nodes_is_walked_without_recursion() -> None:
    chain = {str(n): node("A", x=[str(n - 1), 0]) if n else node("A") for n in range(20_000)}
    assert len(Workflow.parse(chain).links) == 19_999


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.sampled_from(["1", "2", "prompt", "nodes", "class_type", "inputs"]), json_values, max_size=4))
def test_whatever_is_given_is_a_graph_or_one_of_our_errors(data: dict[str, Any]) -> None:
    try:
        flow = Workflow.parse(data)
    except BadInput:
        return
    assert len(flow.nodes) == len(flow.graph) > 0
    assert len(flow.sha256) == 64


# --- naming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "place"),
    [
        ("1.image", ("1", "image")),
        ("1.5.image", ("1.5", "image")),
        ("My.Picture.image", ("1", "image")),
        ("größe: 2.width", ("größe: 2", "width")),
        ("Scale it.width", ("größe: 2", "width")),
        ("ImageScale.width", ("größe: 2", "width")),
        ("9.format.bit_depth", ("9", "format.bit_depth")),
        ("SaveImageAdvanced.format.bit_depth", ("9", "format.bit_depth")),
        ("KSampler.seed", ("7", "seed")),  # a title wins over a class
        ("KSampler.steps", ("8", "steps")),  # only one node of the class has it
        ("Refiner.seed", ("8", "seed")),
        ("+1.upload", ("1", "upload")),
        ("+1.5.upload", ("1.5", "upload")),
        ("+Refiner.cfg", ("8", "cfg")),
        ("+9.format.icc", ("9", "format.icc")),
    ],
)
def test_an_input_is_named_by_id_title_or_class(target: str, place: tuple[str, str]) -> None:
    assert Workflow.parse(GRAPH).resolve(target) == place


def test_an_id_wins_over_a_title_and_a_title_over_a_class() -> None:
    flow = Workflow.parse({"A": node("C", "B", x=1), "B": node("C", "C", x=1), "C": node("A", "A", x=1)})
    assert [flow.resolve(f"{name}.x")[0] for name in "ABC"] == ["A", "B", "C"]
    assert [flow.find_node(name) for name in "ABC"] == ["A", "B", "C"]


def test_a_class_that_fits_twice_is_an_error_with_the_candidates() -> None:
    with pytest.raises(TargetAmbiguous) as caught:
        Workflow.parse(GRAPH).resolve("LoadImage.image")
    assert caught.value.details["candidates"] == ["1.image (My.Picture, LoadImage)", "1.5.image (LoadImage, LoadImage)"]
    assert "1.image" in caught.value.hint


def test_two_ways_to_split_that_both_fit_are_ambiguous_too() -> None:
    flow = Workflow.parse({"a": node("A", more={"b.c": 1}), "a.b": node("A", c=1)})
    with pytest.raises(TargetAmbiguous):
        flow.resolve("a.b.c")


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("7.sed", "7.seed"),
        ("7.sed", "+7.sed"),
        ("Refinr.steps", "Refiner.steps"),
        ("refiner.steps", "Refiner.steps"),
        ("nonsense", "NODEID.input"),
        ("", "NODEID.input"),
        (".", "workflows show"),
        ("+", "NODEID.input"),
        ("+7.", "NODEID.input"),
    ],
)
def test_an_unknown_target_says_what_was_probably_meant(target: str, hint: str) -> None:
    with pytest.raises(TargetUnknown) as caught:
        Workflow.parse(GRAPH).resolve(target)
    assert hint in caught.value.hint


def test_finding_a_node_says_which_ones_fit_and_which_were_meant() -> None:
    flow = Workflow.parse(GRAPH)
    with pytest.raises(TargetAmbiguous, match="2 nodes"):
        flow.find_node("LoadImage")
    with pytest.raises(TargetUnknown) as caught:
        flow.find_node("Refine")
    assert "Refiner" in caught.value.hint
    assert flow.title("nowhere") == "nowhere"


@given(st.text(max_size=30))
def test_any_target_is_a_place_or_one_of_our_errors(target: str) -> None:
    flow = Workflow.parse(GRAPH)
    try:
        node_id, input_name = flow.resolve(target)
    except BadInput:
        return
    assert input_name in flow.nodes[node_id].inputs or target.startswith("+")


names = st.text(min_size=1, max_size=6)


@given(st.dictionaries(names, st.dictionaries(names, st.integers(), min_size=1)))
def test_every_input_is_reached_by_its_id_unless_two_readings_fit(shape: dict[str, dict[str, int]]) -> None:
    graph = {node_id: {"class_type": "C", "inputs": inputs} for node_id, inputs in shape.items()}
    if not graph or isinstance(graph.get("nodes"), list):
        return
    flow = Workflow.parse({"first": node("F", x=1), **graph})
    for node_id, inputs in shape.items():
        for name in inputs:
            readings = [
                (target[:at], target[at + 1 :])
                for target in [f"{node_id}.{name}"]
                for at, char in enumerate(target)
                if char == "." and target[at + 1 :] in shape.get(target[:at], {})
            ]
            if len(readings) == 1:
                assert flow.resolve(f"{node_id}.{name}") == (node_id, name)
            else:
                with pytest.raises(TargetAmbiguous):
                    flow.resolve(f"{node_id}.{name}")


@pytest.mark.threat("S15")
def test_control_characters_of_a_file_do_not_reach_the_terminal() -> None:
    flow = Workflow.parse({"1\x1b[31m": node("A\x07", "T\x1b]0;x", seed=1), "2": node("A\x07", seed=2)})
    for target in ("A\x07.seed", "1\x1b[31m.sead"):
        with pytest.raises(RunComfyError) as caught:
            flow.resolve(target)
        assert "\x1b" not in caught.value.message + caught.value.hint
        assert "\x07" not in caught.value.message + caught.value.hint


def test_close_matches_are_quick_even_for_hostile_texts() -> None:
    assert close_matches("a" * 100_000, ["a" * 100_000 + "b"]) == ["a" * 100_000 + "b"]


# --- what ships -----------------------------------------------------------------------------------------------


def test_the_shipped_workflows_have_names_and_nothing_else_can_be_loaded() -> None:
    assert workflows.names() == [
        "flux_image",
        "generate_flux_mesh",
        "generate_flux_mesh2",
        "image_invert",
        "image_to_mesh",
        "wf_realistic_portrait",
    ]
    with pytest.raises(KeyError):
        workflows.load("../state/README")
