"""How the emulated ComfyUI runs a graph where the recordings do not look: lists, lazy inputs, cache keys, overlap."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest

from runcomfy.testing.emulators.comfyui import ComfyUIEmulator
from runcomfy.testing.emulators.comfyui.nodes.base import (
    ExecutionBlocker,
    InputSpec,
    NodeClass,
    NodeContext,
    NodeResult,
)

Inputs = dict[str, Any]
Nodes = dict[str, tuple[str, Inputs]]


async def _count(_: NodeContext, inputs: Inputs) -> NodeResult:
    return NodeResult([list(range(inputs["to"]))])


async def _double(_: NodeContext, inputs: Inputs) -> NodeResult:
    return NodeResult([inputs["value"] * 2])


async def _show(_: NodeContext, inputs: Inputs) -> NodeResult:
    return NodeResult(ui={"text": [str(inputs["value"])]})


async def _add(_: NodeContext, inputs: Inputs) -> NodeResult:
    return NodeResult([sum(inputs["value"])])


async def _choose(_: NodeContext, inputs: Inputs) -> NodeResult:
    return NodeResult([inputs["yes"] if inputs["which"] else inputs["no"]])


async def _wait(context: NodeContext, inputs: Inputs) -> NodeResult:
    await context.sleep(inputs["value"])
    return NodeResult([inputs["value"]])


async def _odd_only(_: NodeContext, inputs: Inputs) -> NodeResult:
    return NodeResult([inputs["value"] if inputs["value"] % 2 else ExecutionBlocker()])


async def _fail(_: NodeContext, inputs: Inputs) -> NodeResult:
    raise ZeroDivisionError(f"by {inputs['value']}")


def node(name: str, run: Any, inputs: dict[str, Any] | None = None, **more: Any) -> NodeClass:
    return NodeClass(name, run, InputSpec(inputs or {"value": ["INT", {}]}), **{"outputs": ("INT",), **more})


LAZY = {"which": ["BOOLEAN", {}], "yes": ["INT", {"lazy": True}], "no": ["INT", {"lazy": True}]}
NODES = {
    one.name: one
    for one in (
        node("Count", _count, {"to": ["INT", {}]}, output_is_list=(True,)),
        node("Double", _double),
        node("Show", _show, {"value": ["*", {}]}, outputs=(), output_node=True),
        node("Add", _add, input_is_list=True),
        node("Choose", _choose, LAZY, needs=lambda inputs: ["yes" if inputs["which"] else "no"]),
        node("Wait", _wait),
        node("WaitAside", _wait, concurrent=True),
        node("OddOnly", _odd_only),
        node("Fail", _fail),
        node("Fresh", _double, fingerprint=lambda _, __: float("nan")),
    )
}


async def run(comfyui: ComfyUIEmulator, graph: Nodes) -> dict[str, Any]:
    """Run a graph and return its history entry."""
    prompt = {node_id: {"class_type": name, "inputs": inputs} for node_id, (name, inputs) in graph.items()}
    async with aiohttp.ClientSession(comfyui.url) as http:
        async with http.post("/prompt", json={"prompt": prompt}) as response:
            assert response.status == 200, await response.text()
            prompt_id = (await response.json())["prompt_id"]
        await asyncio.sleep(60)
        async with http.get(f"/history/{prompt_id}") as response:
            entry: dict[str, Any] = (await response.json())[prompt_id]
            return entry


@pytest.fixture
async def comfyui() -> Any:
    async with ComfyUIEmulator(nodes=NODES) as emulator:
        yield emulator


async def test_a_list_runs_the_nodes_behind_it_once_for_each_entry(comfyui: ComfyUIEmulator) -> None:
    entry = await run(
        comfyui, {"1": ("Count", {"to": 4}), "2": ("Double", {"value": ["1", 0]}), "3": ("Show", {"value": ["2", 0]})}
    )
    assert entry["outputs"]["3"]["text"] == ["0", "2", "4", "6"]


async def test_a_node_that_wants_lists_is_called_once(comfyui: ComfyUIEmulator) -> None:
    entry = await run(
        comfyui, {"1": ("Count", {"to": 5}), "2": ("Add", {"value": ["1", 0]}), "3": ("Show", {"value": ["2", 0]})}
    )
    assert entry["outputs"]["3"]["text"] == ["10"]


async def test_a_blocker_stops_only_what_would_read_it(comfyui: ComfyUIEmulator) -> None:
    entry = await run(
        comfyui, {"1": ("Count", {"to": 4}), "2": ("OddOnly", {"value": ["1", 0]}), "3": ("Show", {"value": ["2", 0]})}
    )
    assert entry["status"]["status_str"] == "success"
    assert entry["outputs"]["3"]["text"] == ["1", "3"]


@pytest.mark.parametrize(("which", "ran"), [(True, "2"), (False, "3")])
async def test_only_the_wanted_one_of_two_lazy_inputs_runs(comfyui: ComfyUIEmulator, which: bool, ran: str) -> None:
    await run(
        comfyui,
        {
            "2": ("Double", {"value": 1}),
            "3": ("Double", {"value": 2}),
            "4": ("Choose", {"which": which, "yes": ["2", 0], "no": ["3", 0]}),
            "5": ("Show", {"value": ["4", 0]}),
        },
    )
    assert comfyui.run_log[0].nodes == [ran, "4", "5"]


@pytest.mark.parametrize(("name", "seconds"), [("Wait", 20.0), ("WaitAside", 10.0)])
async def test_only_async_nodes_of_a_prompt_overlap(name: str, seconds: float) -> None:
    async with ComfyUIEmulator(nodes=NODES, now=asyncio.get_running_loop().time) as comfyui:
        two: Nodes = {str(i): (name, {"value": 10}) for i in (1, 2)}
        two["2"][1]["ignored"] = "makes it another node to the cache"
        await run(comfyui, {**two, "3": ("Show", {"value": ["1", 0]}), "4": ("Show", {"value": ["2", 0]})})
        (record,) = comfyui.run_log
    assert record.ended is not None
    assert record.ended - record.started == pytest.approx(seconds, abs=1)


async def test_equal_nodes_of_a_prompt_run_once(comfyui: ComfyUIEmulator) -> None:
    same: Nodes = {str(i): ("Double", {"value": 7}) for i in (1, 2)}
    await run(comfyui, {**same, "3": ("Show", {"value": ["1", 0]}), "4": ("Show", {"value": ["2", 0]})})
    assert sorted(comfyui.run_log[0].nodes) in (["1", "3"], ["2", "4"])


async def test_the_cache_keeps_what_the_last_prompt_had(comfyui: ComfyUIEmulator) -> None:
    """As the real server by default: another prompt in between forgets the first."""
    first: Nodes = {"1": ("Double", {"value": 1}), "2": ("Show", {"value": ["1", 0]})}
    other: Nodes = {"1": ("Double", {"value": 2}), "2": ("Show", {"value": ["1", 0]})}
    for graph in (first, first, other, first):
        await run(comfyui, graph)
    assert [record.cached for record in comfyui.run_log] == [[], ["1", "2"], [], []]


async def test_a_node_that_is_never_the_same_always_runs(comfyui: ComfyUIEmulator) -> None:
    graph: Nodes = {"1": ("Fresh", {"value": 1}), "2": ("Show", {"value": ["1", 0]})}
    for _ in range(2):
        await run(comfyui, graph)
    assert [record.nodes for record in comfyui.run_log] == [["1", "2"], ["1", "2"]]


async def test_what_was_made_before_a_failure_stays_made(comfyui: ComfyUIEmulator) -> None:
    good: Nodes = {"1": ("Double", {"value": 3}), "2": ("Show", {"value": ["1", 0]})}
    entry = await run(comfyui, {**good, "3": ("Fail", {"value": ["1", 0]}), "4": ("Show", {"value": ["3", 0]})})
    assert entry["status"]["status_str"] == "error"
    assert entry["outputs"] == {"2": {"text": ["6"]}}
    failure = dict(entry["status"]["messages"])["execution_error"]
    assert failure["exception_type"] == "ZeroDivisionError"
    assert failure["exception_message"] == "by 6\n"
    assert failure["current_inputs"] == {"value": [6]}
    await run(comfyui, good)
    assert comfyui.run_log[1].cached == ["1", "2"]


async def test_a_literal_list_is_wrapped(comfyui: ComfyUIEmulator) -> None:
    entry = await run(comfyui, {"1": ("Show", {"value": {"__value__": [1, 2]}})})
    assert entry["outputs"]["1"]["text"] == ["[1, 2]"]
