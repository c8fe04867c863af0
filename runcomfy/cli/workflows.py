"""`comfyctl workflows`: which workflows there are, what goes in and comes out, and whether a machine can run them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from runcomfy.cli.runner import Interrupts, run_async

if TYPE_CHECKING:
    from runcomfy.domain.preflight import FileToCheck, Problem
    from runcomfy.domain.sidecar import Sidecar
    from runcomfy.domain.workflow import Workflow

NodeInfo = Callable[[Collection[str]], Awaitable[Mapping[str, Any]]]
ClassNames = Callable[[], Awaitable[Collection[str]]]


@click.group()
def workflows() -> None:
    """List, show and check workflows.

    A workflow is one that ships, by its name, or any file that ComfyUI exported with Workflow > Export (API). A .toml
    file of the same name beside it says which node is which input and output.
    """


@workflows.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def ls(as_json: bool) -> None:
    """List the workflows that ship."""
    from runcomfy.cli.output import show_json, table
    from workflows import names

    found = [_summary(*_open(name)) for name in names()]
    if as_json:
        show_json(found)
        return
    rows = [(each["name"], str(each["node_count"]), " ".join(each["needs"]), each["description"]) for each in found]
    click.echo(table(("name", "nodes", "needs", "description"), rows))


@workflows.command()
@click.argument("workflow")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(workflow: str, as_json: bool) -> None:
    """Show what WORKFLOW takes and delivers, its nodes, and the models and node packs it needs."""
    from runcomfy.cli.output import show_json

    facts = _facts(*_open(workflow))
    if as_json:
        show_json(facts)
    else:
        _print_facts(facts)


@workflows.command()
@click.argument("workflow")
@click.option("--server", metavar="URL", help="Check against the nodes and models of this ComfyUI, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(workflow: str, server: str | None, as_json: bool) -> int:
    """Check WORKFLOW: is it a graph, does its sidecar fit, and (with --server) would that machine run it.

    Sends nothing to the machine but questions. Exit code 0 if nothing speaks against it, 2 if something does.
    """
    from runcomfy.domain.exceptions import RunComfyError

    try:
        if server is None:
            return _report(*_open(workflow), None, as_json=as_json)
        return run_async(lambda interrupts: _check(interrupts, workflow, server, as_json=as_json))
    except RunComfyError as error:
        if not as_json:
            raise
        from runcomfy.cli.output import show_json

        show_json({"workflow": workflow, "ok": False, "server": None, "error": error.as_dict(), "problems": []})
        return error.exit_code


def _open(wanted: str) -> tuple[Workflow, Sidecar | None]:
    """Load a workflow and its sidecar, and make sure that they fit. Raises BadInput."""
    from runcomfy.bootstrap import App
    from runcomfy.domain.sidecar import Sidecar
    from runcomfy.domain.workflow import Workflow

    text, toml, name = App.workflow_files()(wanted)
    workflow = Workflow.parse(text, name=name)
    sidecar = Sidecar.parse(toml, name) if toml is not None else None
    if sidecar is not None:
        sidecar.check(workflow)
    return workflow, sidecar


# --- check ----------------------------------------------------------------------------------------------------


async def judge(workflow: Workflow, node_info: NodeInfo, class_names: ClassNames) -> list[Problem]:
    """Return what a server's node list says against a workflow; the whole list is asked for only if it would help."""
    from runcomfy.domain.preflight import preflight

    info = await node_info(workflow.class_types)
    problems = preflight(workflow.graph, info)
    if any(problem.code == "unknown-class" for problem in problems):
        problems = preflight(workflow.graph, info, class_names=await class_names())
    return problems


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a server's node list says."""

    server: str
    problems: list[Problem]
    files: list[FileToCheck]


async def _check(interrupts: Interrupts, wanted: str, server: str, *, as_json: bool) -> int:
    from runcomfy.cli.app import open_app
    from runcomfy.domain.preflight import files_to_check

    workflow, sidecar = await asyncio.to_thread(_open, wanted)
    async with open_app(interrupts, quiet=as_json) as app:
        client = app.given_server(server)
        problems = await judge(workflow, client.node_info, client.class_names)
        files = files_to_check(workflow.graph, await client.node_info(workflow.class_types))
        verdict = Verdict(client.masked_url, problems, files)
    return _report(workflow, sidecar, verdict, as_json=as_json)


def _report(workflow: Workflow, sidecar: Sidecar | None, verdict: Verdict | None, *, as_json: bool) -> int:
    from runcomfy.cli.output import show_json

    problems = verdict.problems if verdict else []
    facts = _summary(workflow, sidecar)
    facts = {
        "workflow": facts.pop("name"),
        "ok": not problems,
        **facts,
        "server": verdict.server if verdict else None,
        "problems": [problem.as_dict() for problem in problems],
        "files": [
            {"target": f"{file.node_id}.{file.input_name}", "name": file.name}
            for file in (verdict.files if verdict else ())
        ],
    }
    if as_json:
        show_json(facts)
    else:
        _print_check(facts, problems)
    return 2 if problems else 0


def _print_check(facts: Mapping[str, Any], problems: list[Problem]) -> None:
    from runcomfy.domain.exceptions import foreign_text
    from runcomfy.domain.preflight import require_runnable

    if problems:
        for problem in problems:
            click.echo(f"{problem.code}: {foreign_text(problem.message, 600)}")
            click.echo(f"  -> {foreign_text(problem.hint, 600)}")
        require_runnable(problems, where=facts["server"])
    click.echo(
        f"{facts['workflow']}: {facts['node_count']} nodes, sound" + (", its sidecar fits" if facts["sidecar"] else "")
    )
    if facts["server"] is None:
        click.echo("not compared with any machine; --server URL does that")
        return
    click.echo(f"{facts['server']} has every node and every choice it needs")
    for file in facts["files"]:
        click.echo(f"expects a file there: {foreign_text(file['name'])} ({foreign_text(file['target'])})")


# --- show -----------------------------------------------------------------------------------------------------


def _summary(workflow: Workflow, sidecar: Sidecar | None) -> dict[str, Any]:
    return {
        "name": workflow.name,
        "description": sidecar.description if sidecar else "",
        "node_count": len(workflow.nodes),
        "needs": [_flag(item["name"]) for item in _inputs(workflow, sidecar) if item["required"]],
        "sha256": workflow.sha256,
        "sidecar": sidecar is not None,
    }


def _facts(workflow: Workflow, sidecar: Sidecar | None) -> dict[str, Any]:
    from runcomfy.domain.workflow import is_link

    nodes = [
        {
            "id": node.id,
            "class_type": node.class_type,
            "title": node.title,
            "inputs": {name: held for name, held in node.inputs.items() if not is_link(held, workflow.graph)},
            "links": {name: held for name, held in node.inputs.items() if is_link(held, workflow.graph)},
        }
        for node in workflow.nodes.values()
    ]
    return {
        **_summary(workflow, sidecar),
        "inputs": _inputs(workflow, sidecar),
        "seeds": _seeds(workflow, sidecar),
        "outputs": [
            {
                "name": item.name,
                "kind": str(item.kind),
                "node": workflow.find_node(item.node),
                "file": item.file,
                "required": item.required,
                "description": item.description,
            }
            for item in (sidecar.outputs.values() if sidecar else ())
        ],
        "models": _models(workflow, sidecar),
        "packs": [
            {"name": pack.name, "url": pack.url, "classes": list(pack.classes)}
            for pack in (sidecar.packs if sidecar else ())
        ],
        "nodes": nodes,
    }


def _inputs(workflow: Workflow, sidecar: Sidecar | None) -> list[dict[str, Any]]:
    """What can be set by name; without a sidecar what `--image` and `--prompt` would find by themselves."""
    from runcomfy.domain.exceptions import BadInput
    from runcomfy.domain.guess import guess_image, guess_prompt

    if sidecar is not None and sidecar.inputs:
        return [
            {
                "name": item.name,
                "kind": item.kind,
                "targets": list(item.targets),
                "required": item.required,
                "minimum": item.minimum,
                "maximum": item.maximum,
                "default": sidecar.defaults.get(item.name, workflow.value(*workflow.resolve(item.targets[0]))),
                "description": item.description,
            }
            for item in sidecar.inputs.values()
        ]
    found: list[dict[str, Any]] = []
    looks: tuple[tuple[str, str, Callable[[], list[tuple[str, str]]]], ...] = (
        ("image", "image", lambda: [guess_image(workflow)]),
        ("prompt", "text", lambda: guess_prompt(workflow)),
    )
    for name, kind, look in looks:
        try:
            places = look()
        except BadInput:
            continue
        found.append(
            {
                "name": name,
                "kind": kind,
                "targets": [f"{node_id}.{input_name}" for node_id, input_name in places],
                "required": False,
                "minimum": None,
                "maximum": None,
                "default": workflow.value(*places[0]),
                "description": "found by the graph's shape",
            }
        )
    return found


def _seeds(workflow: Workflow, sidecar: Sidecar | None) -> list[dict[str, Any]]:
    from runcomfy.domain.guess import guess_seeds

    if sidecar is not None and sidecar.seeds:
        return [
            {"target": seed.target, "minimum": seed.minimum, "maximum": seed.maximum} for seed in sidecar.seeds.values()
        ]
    return [
        {"target": f"{node_id}.{name}", "minimum": None, "maximum": None} for node_id, name in guess_seeds(workflow)
    ]


def _models(workflow: Workflow, sidecar: Sidecar | None) -> list[dict[str, Any]]:
    from runcomfy.domain.preflight import model_files

    if sidecar is not None and sidecar.models:
        return [{"file": m.file, "folder": m.folder, "note": m.note, "url": m.url} for m in sidecar.models]
    found = {(model.file, model.folder) for model in model_files(workflow.graph)}
    return [{"file": file, "folder": folder, "note": "", "url": ""} for file, folder in sorted(found)]


def _flag(name: str) -> str:
    return f"--{name}" if name in ("image", "prompt") else f"--set {name}=…"


def _sections(facts: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Return what is shown of a workflow: the heading, the columns and the rows of each table."""
    from runcomfy.domain.exceptions import foreign_text

    return [
        (
            "Inputs",
            ("option", "goes to", "now", "description"),
            [
                (
                    _flag(item["name"]),
                    ", ".join(item["targets"]),
                    foreign_text(item["default"], 30),
                    _words(item),
                )
                for item in facts["inputs"]
            ],
        ),
        (
            "Seeds (--seed; random unless given)",
            ("target", "from", "to"),
            [(s["target"], _limit(s["minimum"]), _limit(s["maximum"])) for s in facts["seeds"]],
        ),
        (
            "Results",
            ("name", "kind", "node", "file", "description"),
            [
                (
                    o["name"],
                    o["kind"],
                    o["node"],
                    o["file"],
                    o["description"] + ("" if o["required"] else " (optional)"),
                )
                for o in facts["outputs"]
            ],
        ),
        (
            "Models it needs",
            ("file", "folder", "note"),
            [(m["file"], m["folder"] and f"models/{m['folder']}", m["note"]) for m in facts["models"]],
        ),
        (
            "Node packs it needs",
            ("name", "for", "from"),
            [(p["name"], ", ".join(p["classes"]), p["url"]) for p in facts["packs"]],
        ),
        (
            "Nodes",
            ("id", "class", "title", "inputs to --set"),
            [(n["id"], n["class_type"], n["title"], ", ".join(n["inputs"])) for n in facts["nodes"]],
        ),
    ]


def _print_facts(facts: Mapping[str, Any]) -> None:
    from runcomfy.cli.output import table
    from runcomfy.domain.exceptions import foreign_text

    click.echo(
        foreign_text(facts["name"]) + (f": {foreign_text(facts['description'])}" if facts["description"] else "")
    )
    click.echo(f"{facts['node_count']} nodes, sha256 {facts['sha256']}")
    for heading, headers, rows in _sections(facts):
        if rows:
            click.echo(f"\n{heading}\n{table(headers, rows)}")
    if not facts["outputs"]:
        click.echo("\nResults: everything that its output nodes report")


def _words(item: Mapping[str, Any]) -> str:
    said = [item["description"]] if item["description"] else []
    if item["minimum"] is not None or item["maximum"] is not None:
        said.append(f"{_limit(item['minimum'])} to {_limit(item['maximum'])}")
    if item["required"]:
        said.append("required")
    return ", ".join(said)


def _limit(value: float | None) -> str:
    return "…" if value is None else f"{value}"
