"""docs/reference/http.md has every route, field and code of the API, written from the API's own document."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

from launcher import errors, schemas
from launcher.guarding.rules import Head, is_conjures
from launcher.web_app import ROUTERS
from runcomfy.domain.exceptions import RunComfyError
from runcomfy.testing.sources import parsed

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "http.md"
TITLES = {
    "jobs": "Jobs",
    "uploads": "Uploads",
    "events": "Events",
    "queue": "The queue",
    "machines": "Machines",
    "costs": "Money",
    "presence": "Presence",
    "workflows": "Workflows",
    "session": "The page's login",
    "service": "Figures",
    "conjure": "CONJURE's endpoints",
}
"""Tag of the routes -> heading, in the page's order."""
ORDERS: dict[str, type[BaseModel]] = {
    "POST /jobs": schemas.JobOrder,
    "PATCH /jobs/{job_id}": schemas.JobChange,
    "POST /jobs/{job_id}/again": schemas.Again,
    "POST /queue/pause": schemas.PauseOrder,
    "POST /machines/{machine_id}/stop": schemas.StopOrder,
    "POST /presence": schemas.PresenceOrder,
    "POST /costs/estimate": schemas.EstimateOrder,
}
"""Route -> the JSON it takes."""

KeepCurrent = Callable[..., None]


@cache
def document() -> Mapping[str, Any]:
    web = FastAPI()
    for router in ROUTERS:
        web.include_router(router)
    return web.openapi()


def operations() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def routes_part() -> str:
    by_tag: dict[str, list[str]] = {tag: [] for tag in TITLES}
    for method, path, operation in operations():
        words = " ".join(operation["description"].split("\n\n")[0].split()).replace("|", "\\|")
        asked = [f"`{one['name']}`" for one in operation.get("parameters", ()) if one["in"] == "query"]
        words += f" Query: {', '.join(asked)}." if asked else ""
        goods = ", ".join(sorted(status for status in operation["responses"] if status < "400"))
        (tag,) = operation["tags"]
        by_tag[tag].append(f"| `{method} {path}` | {words} | {goods} |")
    lines: list[str] = []
    for tag, rows in by_tag.items():
        lines += [f"### {TITLES[tag]}", "", "| route | what it does | success |", "|---|---|---|", *rows, ""]
    return "\n".join(lines)


def kind_of(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    if "const" in schema:
        return f"`{str(schema['const']).lower()}`"
    if "anyOf" in schema:
        return " or ".join(kind_of(one) for one in schema["anyOf"] if one.get("type") != "null")
    kind = str(schema["type"])
    kind = {"integer": "whole number", "string": "text", "boolean": "true or false"}.get(kind, kind)
    lowest = schema.get("minimum", schema.get("exclusiveMinimum"))
    highest = schema.get("maximum")
    if lowest is not None and highest is not None:
        kind += f", {'above ' if 'exclusiveMinimum' in schema else ''}{lowest} to {highest}"
    if schema["type"] == "string" and "maxLength" in schema:
        kind += f", {schema['maxLength']} characters at most"
    return kind


def bodies_part() -> str:
    lines: list[str] = []
    for route, model in ORDERS.items():
        schema = model.model_json_schema()
        lines += [f"### `{route}`", "", "| field | what | |", "|---|---|---|"]
        for name, field in schema["properties"].items():
            must = " Must be there." if name in schema.get("required", ()) else ""
            words = field.get("description", "") + must
            lines.append(f"| `{name}` | {kind_of(field)} | {words.strip()} |")
        lines.append("")
    return "\n".join(lines)


def codes() -> dict[str, tuple[int, str]]:
    """Code -> status and meaning, of what HTTP alone knows: the guard's refusals, and errors with a status."""
    found: dict[str, tuple[int, str]] = {"request-invalid": (422, "the body or a value in the address does not fit")}
    for path in sorted((ROOT / "launcher" / "guarding").glob("*.py")):
        for node in ast.walk(parsed(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Refusal" and len(node.args) >= 3:
                status, code, message = node.args[:3]
                if isinstance(code, ast.Constant) and isinstance(message, ast.Constant):  # else it tells ours
                    _, known = found.get(str(code.value), (0, ""))
                    words = f"{known}; {message.value!s}" if known else str(message.value)
                    found[str(code.value)] = (ast.literal_eval(status), words)
    for error in family(errors.HttpError):
        words = " ".join((error.__doc__ or "").split()).rstrip(".")
        found[error.code] = (error.status, words[0].lower() + words[1:])
    return dict(sorted(found.items(), key=lambda item: (item[1][0], item[0])))


def family(root: type[errors.HttpError]) -> Iterator[type[errors.HttpError]]:
    yield root
    for child in root.__subclasses__():
        yield from family(child)


def statuses_part() -> str:
    lines = ["| code | status | means |", "|---|---|---|"]
    lines += [f"| `{code}` | {status} | {words} |" for code, (status, words) in codes().items()]
    lines += ["", "| errors of the product | status |", "|---|---|"]
    by_status: dict[int, list[type[RunComfyError]]] = {}
    for kind, status in errors.STATUS.items():
        by_status.setdefault(status, []).append(kind)
    for status, kinds in sorted(by_status.items()):
        lines.append(f"| {', '.join(f'`{kind.code}`' for kind in kinds)} | {status} |")
    return "\n".join(lines)


def test_the_routes_are_current(keep_current: KeepCurrent) -> None:
    keep_current("reference/http.md", routes_part(), part="routes")


def test_the_bodies_are_current(keep_current: KeepCurrent) -> None:
    keep_current("reference/http.md", bodies_part(), part="bodies")


def test_the_codes_are_current(keep_current: KeepCurrent) -> None:
    keep_current("reference/http.md", statuses_part(), part="codes")


def test_every_route_is_named_whether_it_is_in_the_document_or_not() -> None:
    text = PAGE.read_text(encoding="utf-8")
    routes = [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]
    every = {(method, route.path) for route in routes for method in route.methods or ()}
    assert len(every) > 45
    for method, path in every:
        assert f"{method} {path}`" in text or f"`{method} {path}" in text, f"{method} {path} is not on the page"


def test_every_body_in_json_is_explained() -> None:
    """CONJURE's are left to CONJURE: they are named on its page."""
    for method, path, operation in operations():
        content = operation.get("requestBody", {}).get("content", {})
        if "application/json" in content and operation["tags"] != ["conjure"]:
            assert f"{method} {path}" in ORDERS
    assert set(ORDERS) <= {f"{method} {path}" for method, path, _ in operations()}


def test_the_guards_list_of_conjures_endpoints_is_the_routers() -> None:
    """What answers without a token is what is on the page under CONJURE's name, and nothing else."""
    for method, path, operation in operations():
        filled = re.sub(r"\{[a-z_]+\}", "x", path)
        head = Head(method, filled, "http", (("host", "127.0.0.1"),))
        assert is_conjures(head) == (operation["tags"] == ["conjure"]), f"{method} {path}"
