"""
Generation on Hugging Face Spaces, as CONJURE's local mode did it: chosen by `CONJURE_LOCAL_BACKEND=huggingface`.

It is never fallen back to: what is asked of the user's own ComfyUI is not sent to strangers' computers. It needs the
extra `huggingface` (gradio_client) and a token in `HUGGINGFACE_HUB_ACCESS_TOKEN`. Nothing is billed, nothing durable
about it: a call lasts as long as the Space takes.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from launcher.conjure import places
from launcher.conjure.engine import Engine
from launcher.conjure.errors import GenerationFailed, ServiceUnavailable
from launcher.conjure.places import Places, Verified
from launcher.conjure.snapshots import path_of, snapshot
from runcomfy.adapters.files import make_private_dir
from runcomfy.adapters.media import inspect
from runcomfy.domain.exceptions import ExtraMissing, OutputCorrupt, RunComfyError, ValueInvalid, foreign_text
from runcomfy.domain.job import OutputKind

BACKEND_VARIABLE: Final = "CONJURE_LOCAL_BACKEND"
TOKEN_VARIABLE: Final = "HUGGINGFACE_HUB_ACCESS_TOKEN"  # noqa: S105 - the variable's name
HUGGING_FACE: Final = "huggingface"
COMFYUI: Final = "comfyui"

FLUX_SPACE: Final = ("black-forest-labs/FLUX.1-dev", "/infer")
DEPTH_SPACE: Final = ("black-forest-labs/FLUX.1-Depth-dev", "/infer")
MESH_SPACE: Final = ("nvidia/PartPacker", "/process_3d")

_PICTURE: Final = {"seed": 0, "width": 1024, "height": 1024, "num_inference_steps": 28}
_MESH: Final = {
    "num_steps": 50,
    "cfg_scale": 7,
    "grid_res": 384,
    "seed": 0,
    "simplify_mesh": False,
    "target_num_faces": 100_000,
}


class Spaces(Protocol):
    """What calls a Space. Blocks."""

    def predict(self, space: str, api_name: str, files: Mapping[str, str], values: Mapping[str, Any]) -> Any:
        """Return what the Space answers; `files` are paths by parameter. May raise anything."""
        ...


class GradioSpaces:
    """Spaces over gradio_client."""

    def __init__(self, token: str) -> None:
        self._token = token

    def predict(self, space: str, api_name: str, files: Mapping[str, str], values: Mapping[str, Any]) -> Any:
        """Return what the Space answers."""
        gradio = importlib.import_module("gradio_client")
        try:
            client = gradio.Client(space, hf_token=self._token)
        except TypeError:  # newer versions have another name for it
            client = gradio.Client(space, token=self._token)
        given = {name: gradio.handle_file(path) for name, path in files.items()}
        return client.predict(**given, **values, api_name=api_name)


def chosen_backend() -> str:
    """Return what local mode runs on. Raises ValueInvalid."""
    found = os.environ.get(BACKEND_VARIABLE, "").strip().lower() or COMFYUI
    if found not in (COMFYUI, HUGGING_FACE):
        raise ValueInvalid(
            f"{BACKEND_VARIABLE} = {foreign_text(found, 60)!r} is not known", hint=f"{COMFYUI} or {HUGGING_FACE}"
        )
    return found


def availability() -> tuple[bool, str]:
    """Return whether Spaces can be called, and why not. Asks nobody."""
    if not os.environ.get(TOKEN_VARIABLE, "").strip():
        return False, f"not set: {TOKEN_VARIABLE}"
    if importlib.util.find_spec("gradio_client") is None:
        return False, "gradio_client is not installed: pip install 'runcomfy-orchestrator[huggingface]'"
    return True, ""


def open_spaces() -> Spaces:
    """Return what calls Spaces. Raises ExtraMissing, ServiceUnavailable."""
    able, why = availability()
    if not able:
        kind = ExtraMissing if "not installed" in why else ServiceUnavailable
        raise kind(f"Hugging Face Spaces cannot be used: {why}", hint=f"or set {BACKEND_VARIABLE}={COMFYUI}")
    return GradioSpaces(os.environ[TOKEN_VARIABLE].strip())


class SpacesGenerating:
    """The calls of a service that generates on Spaces."""

    def __init__(self, engine: Engine, at: Places, *, mode: str, spaces: Spaces | None = None) -> None:
        """`spaces`: what calls them; None: gradio_client, once it is needed."""
        self._engine, self._at, self._mode, self._spaces = engine, at, mode, spaces

    async def image(self, prompt: str, seed: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Make a picture from words."""
        values, left = _values(_PICTURE | {"seed": seed, "randomize_seed": True}, asked)
        made, used = await self._call(
            FLUX_SPACE, {}, {"prompt": prompt, **values}, OutputKind.IMAGE, int(values["seed"])
        )
        place = places.flux_result(used)
        await self._publish(place, made)
        return self._answer("image_path", place, used, left)

    async def depth(self, control_image_path: str, prompt: str, seed: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Make a picture from words over the depth of another."""
        known = _PICTURE | {"seed": seed, "randomize_seed": False, "guidance_scale": 10}
        values, left = _values(known, asked)
        picture = await self._snapshot(control_image_path)
        made, used = await self._call(
            DEPTH_SPACE, {"control_image": picture}, {"prompt": prompt, **values}, OutputKind.IMAGE, int(values["seed"])
        )
        await self._publish(places.FLUX_IMAGE, made)
        return self._answer("image_path", places.FLUX_IMAGE, used, left)

    async def model(self, image_path: str, seed: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Make a mesh from a picture."""
        values, left = _values(_MESH | {"seed": seed}, asked)
        picture = await self._snapshot(image_path)
        seed = int(seed)
        made, _ = await self._call(MESH_SPACE, {"input_image": picture}, values, OutputKind.MESH, seed)
        place = places.mesh_result(seed)
        await self._publish(place, made)
        return self._answer("model_path", place, seed, left)

    async def unified(self, asked: Any) -> dict[str, Any]:
        """Say that Spaces cannot do both in one run."""
        del asked
        words = "Hugging Face Spaces make picture and mesh in two calls; use another mode for both at once"
        return {"success": False, "error": words, "error_code": ServiceUnavailable.code, "generation_mode": self._mode}

    # -- how -----------------------------------------------------------------------------------------------

    async def _snapshot(self, path: Any) -> str:
        name = path_of(path)
        limit = self._engine.app.settings.files.max_input_pixels
        folder = self._engine.folder / "inputs"
        return (await asyncio.to_thread(snapshot, self._at.at(name), folder, max_pixels=limit)).path

    async def _call(
        self, space: tuple[str, str], files: Mapping[str, str], values: Mapping[str, Any], kind: OutputKind, seed: int
    ) -> tuple[Verified, int]:
        spaces = self._spaces or open_spaces()
        try:
            answer = await asyncio.to_thread(spaces.predict, *space, files, values)
        except RunComfyError:
            raise
        except Exception as error:
            raise GenerationFailed(
                f"the Space {space[0]} failed: {foreign_text(error)}",
                hint="see its page on huggingface.co; it may be asleep, busy, or your quota used up",
                details={"code": "space-failed"},
            ) from error
        path, used = _parts(answer, seed)
        if path is None:
            raise GenerationFailed(f"the Space {space[0]} answered without a file", details={"code": "output-missing"})
        limit = self._engine.app.settings.files.max_output_pixels
        return await asyncio.to_thread(_fetched, path, kind, self._engine.folder / "fetched", limit), used

    async def _publish(self, place: Path, made: Verified) -> None:
        try:
            async with self._engine.publishing:
                await asyncio.to_thread(self._at.publish, {place: made})
        finally:
            await asyncio.to_thread(Path(made.path).unlink, missing_ok=True)

    def _answer(self, key: str, place: Path, seed: int, left: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "success": True,
            key: str(place),
            "seed_used": seed,
            "cost": 0.0,
            "generation_mode": self._mode,
            "not_applied": left,
        }


def _values(known: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what the Space is given, and what was asked for beyond."""
    values = {name: value if asked.get(name) is None else asked[name] for name, value in known.items()}
    left = [
        {"name": foreign_text(name, 80), "value": foreign_text(value, 80), "reason": "the Space has no place for it"}
        for name, value in asked.items()
        if name not in known and value is not None
    ]
    return values, left


def _parts(answer: Any, seed: int) -> tuple[str | None, int]:
    """Return the file and the seed of an answer, which comes in several shapes."""
    first, second = (
        (answer[0], answer[1] if len(answer) > 1 else None)
        if isinstance(answer, (tuple, list)) and answer
        else (answer, None)
    )
    path = first.get("path") if isinstance(first, Mapping) else getattr(first, "path", first)
    told = second if isinstance(second, (int, float)) and not isinstance(second, bool) else seed
    used = int(told) if math.isfinite(told) else seed
    return (path if isinstance(path, str) else None), used


def _fetched(path: str, kind: OutputKind, folder: Path, max_pixels: int) -> Verified:
    """Return a checked copy of what a Space brought; other pictures become RGB PNG, as CONJURE's did."""
    make_private_dir(folder)
    media = inspect(path, max_pixels=max_pixels, expected=kind)
    fd, target = tempfile.mkstemp(prefix="space-", suffix=media.extension, dir=folder)
    with os.fdopen(fd, "wb") as file:
        if kind is OutputKind.IMAGE and media.extension != ".png":
            from PIL import Image

            with Image.open(path) as picture:
                picture.convert("RGB").save(file, "PNG")
        else:
            file.write(Path(path).read_bytes())
    data = Path(target).read_bytes()
    if kind is OutputKind.MESH and data[:4] != b"glTF":
        Path(target).unlink()
        raise OutputCorrupt("the Space brought a mesh that is no binary glTF", hint="try again later")
    return Verified(target, len(data), hashlib.sha256(data).hexdigest())
