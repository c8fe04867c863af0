"""Reading Python sources in tests."""

from __future__ import annotations

import ast
import gc


def parsed(text: str) -> ast.Module:
    """Return the tree of a source.

    No garbage is collected in the middle: what that ends may have its traceback written, which parses, too, and Pythons
    before 3.11.8 and 3.12.2 take that for a mistake of their own (CPython issue 106905).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if collects:
            gc.enable()
