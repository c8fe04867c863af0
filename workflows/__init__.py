"""The workflows that ship, as data: a graph in ComfyUI's API format and, beside it, a sidecar that explains it.

Nothing of the library is imported here; reading what the texts mean is `runcomfy.workflow_adapter`'s work.
"""

from importlib.resources import files

__all__ = ["load", "names"]


def names() -> list[str]:
    """Return the names of the shipped workflows, sorted."""
    return sorted(
        entry.name.removesuffix(".json") for entry in files(__name__).iterdir() if entry.name.endswith(".json")
    )


def load(name: str) -> tuple[str, str | None]:
    """Return (graph as JSON text, sidecar as TOML text or None) of a shipped workflow.

    Raises KeyError for a name that is not among `names()`; so a path can never be smuggled in as a name.
    """
    if name not in names():
        raise KeyError(name)
    folder = files(__name__)
    sidecar = folder / f"{name}.toml"
    text = sidecar.read_text(encoding="utf-8") if sidecar.is_file() else None
    return (folder / f"{name}.json").read_text(encoding="utf-8"), text
