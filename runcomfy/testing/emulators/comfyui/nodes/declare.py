"""Short words for declaring a node's inputs, in the two styles that `/object_info` shows.

Old-style nodes write choices as a plain list; newer ones (`python_module` of `comfy_extras` mostly) write
`["COMBO", {"options": […]}]`, and their entries carry more keys (`modern`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SEED_MAX = 2**64 - 1

Declared = list[Any]


def whole(default: int, low: int, high: int, step: int | None = None, **more: Any) -> Declared:
    """An INT."""
    options = {"default": default, "min": low, "max": high} | ({} if step is None else {"step": step})
    return ["INT", {**options, **more}]


def real(default: float, low: float, high: float, step: float | None = None, **more: Any) -> Declared:
    """A FLOAT."""
    options = {"default": default, "min": low, "max": high} | ({} if step is None else {"step": step})
    return ["FLOAT", {**options, **more}]


def text(default: str | None = None, **more: Any) -> Declared:
    """A STRING."""
    return ["STRING", ({} if default is None else {"default": default}) | more]


def flag(default: bool, **more: Any) -> Declared:
    """A BOOLEAN."""
    return ["BOOLEAN", {"default": default, **more}]


def choice(options: Sequence[str], **more: Any) -> Declared:
    """Choices in the old style."""
    return [list(options), dict(more)] if more else [list(options)]


def combo(options: Sequence[str], **more: Any) -> Declared:
    """Choices in the new style."""
    return ["COMBO", {**more, "multiselect": False, "options": list(options)}]


def seed(high: int = SEED_MAX, **more: Any) -> Declared:
    """A seed; a random one is drawn by the page after each run if the widget says so."""
    return whole(0, 0, high, **more)


def modern(outputs: int, *, aliases: Sequence[str] | None = None, essentials: str | None = None) -> Mapping[str, Any]:
    """The further keys of a new-style node's entry."""
    return {
        "output_tooltips": [None] * outputs,
        "output_matchtypes": None,
        "deprecated": False,
        "experimental": False,
        "dev_only": False,
        "api_node": False,
        "price_badge": None,
        "search_aliases": None if aliases is None else list(aliases),
        "essentials_category": essentials,
    }


def aliases(*names: str, essentials: str | None = None) -> Mapping[str, Any]:
    """The further keys of an old-style node's entry."""
    return {"search_aliases": list(names)} | ({} if essentials is None else {"essentials_category": essentials})
