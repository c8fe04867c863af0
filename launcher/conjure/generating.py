"""
What the generation services do, on their engine's event loop: from a call to files at their fixed places.

One object serves one service's calls. A call that is repeated while it runs is joined. What a run brought is kept and
published by the run's own task, not by whoever waits for it: a caller that gives up misses nothing but the answer.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from launcher.conjure import places
from launcher.conjure.engine import Engine, Made, Order
from launcher.conjure.follow_up import MESH_SEED, NOISE_SEED, FollowUp, follow_up
from launcher.conjure.memo import KeptMesh, MeshMemo
from launcher.conjure.parameters import (
    FLUX_IMAGE,
    FLUX_MESH,
    IMAGE_TO_MESH,
    Applied,
    apply,
    mesh_parameters,
    wanted_mesh,
)
from launcher.conjure.places import Places, Verified
from launcher.conjure.runs import runs_folder, sweep_runs
from launcher.conjure.snapshots import Snapshot, path_of, snapshot, sweep
from runcomfy.domain.binding import into_range
from runcomfy.domain.exceptions import InputFileMissing, RunComfyError, ValueInvalid, foreign_text
from runcomfy.domain.job import JobRequest

MESH_SEED_MAX: Final = 2**31 - 1
"""The mesh sampler takes 31 bits; a seed drawn from these is the same number for picture and mesh."""
NOISE_SEED_MAX: Final = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Unified:
    """What a unified call gives; None: the user's prompt or render, a random seed, the workflow's steps."""

    prompt: str | None = None
    render_image_path: str | None = None
    seed: int | None = None
    steps_flux: int | None = None
    steps_partpacker: int | None = None


class Generating:
    """The calls of one service."""

    def __init__(self, engine: Engine, at: Places, *, mode: str, where: str, fixed_places: bool) -> None:
        """`where` the jobs run; `fixed_places`: see `MachineGenerationService`."""
        self._engine, self._at = engine, at
        self._mode, self._where, self._fixed = mode, where, fixed_places
        self._memo = MeshMemo(engine.folder / "meshes")

    # -- a picture from words ------------------------------------------------------------------------------

    async def image(self, prompt: str, seed: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        """See `MachineGenerationService.generate_flux_image`."""
        options = dict(asked)
        # CONJURE's local mode draws a seed unless told not to; its other modes keep to the one that is given.
        usual = not (self._fixed and seed)
        drawn = _wished_seed(seed, randomize=options.pop("randomize_seed", usual))
        applied = apply(FLUX_IMAGE, options)

        async def work() -> dict[str, Any]:
            chosen = _drawn(drawn)
            place = places.FLUX_IMAGE if self._fixed else places.flux_result(chosen)
            request = JobRequest(FLUX_IMAGE, prompt=_text(prompt), seed=chosen)
            made = await self._run(request, applied, {place: "flux"})
            return self._image_answer(place, chosen, made, applied)

        return await self._once("flux_image", work, prompt, drawn, applied)

    async def depth(self, control_image_path: str, prompt: str, seed: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        """See `MachineGenerationService.generate_flux_depth_image`."""
        options = dict(asked)
        drawn = _wished_seed(seed, randomize=options.pop("randomize_seed", False))
        applied = apply(FLUX_MESH, options)

        async def call() -> dict[str, Any]:
            picture = await self._snapshot(control_image_path)

            async def work() -> dict[str, Any]:
                request = JobRequest(FLUX_MESH, image=picture.path, prompt=_text(prompt), seed=_drawn(drawn))
                made = await self._run(request, applied, {places.FLUX_IMAGE: "flux"})
                return self._image_answer(places.FLUX_IMAGE, made.seeds[NOISE_SEED], made, applied)

            return await self._once("flux_depth", work, picture.sha256, prompt, drawn, applied)

        return await self._once("call flux_depth", call, self._mark(control_image_path), prompt, drawn, applied)

    def _image_answer(self, place: Path, seed: int, made: Made, applied: Applied) -> dict[str, Any]:
        return {"success": True, "image_path": str(place), "seed_used": seed, **self._facts(made, applied)}

    # -- a mesh from a picture -----------------------------------------------------------------------------

    async def model(self, image_path: str, seed: int, asked: Mapping[str, Any]) -> dict[str, Any]:
        """See `MachineGenerationService.generate_3d_model`."""
        options = dict(asked)
        drawn = _wished_seed(seed, randomize=options.pop("randomize_seed", False))
        wanted = wanted_mesh(options)
        applied = apply(IMAGE_TO_MESH, options)
        name = "any" if drawn is None else drawn
        parameters = mesh_parameters(IMAGE_TO_MESH, applied.sets)

        async def call() -> dict[str, Any]:
            picture = await self._snapshot(image_path)
            work = self._mesh_of(picture, wanted, drawn, applied)
            return await self._once("3d_model", work, picture.sha256, name, parameters, applied)

        return await self._once("call 3d_model", call, self._mark(image_path), name, parameters, applied)

    def _mesh_of(
        self, picture: Snapshot, wanted: Mapping[str, Any], drawn: int | None, applied: Applied
    ) -> Callable[[], Coroutine[Any, Any, dict[str, Any]]]:
        """Return what gets the mesh of a picture: the kept one that fits, or a new one."""
        place = places.MESH if self._fixed else places.mesh_result(_named_seed(drawn))

        async def work() -> dict[str, Any]:
            kept = None
            if drawn is not None:
                kept = await asyncio.to_thread(self._memo.find, picture.sha256, wanted, drawn)
            if kept is not None:
                mesh = Verified(kept.path, kept.size_bytes, kept.sha256)
                await self._publish({place: mesh})
                return self._kept_answer(place, kept, applied)
            return await self._mesh_alone(picture, _drawn(drawn), applied, place)

        return work

    async def _mesh_alone(self, picture: Snapshot, seed: int, applied: Applied, place: Path) -> dict[str, Any]:
        request = JobRequest(IMAGE_TO_MESH, image=picture.path, seed=seed)
        made = await self._run(request, applied, {place: "mesh"}, picture=picture)
        answer = {"success": True, "model_path": str(place), "seed_used": made.seeds[MESH_SEED], "reused": False}
        return answer | self._facts(made, applied)

    def _kept_answer(self, place: Path, kept: KeptMesh, applied: Applied) -> dict[str, Any]:
        return {
            "success": True,
            "model_path": str(place),
            "seed_used": kept.seed_used,
            "reused": True,
            "cost": 0.0,
            "job_id": kept.job_id,
            "prompt_id": kept.prompt_id,
            "generation_mode": self._mode,
            "not_applied": [each.as_dict() for each in applied.not_applied],
        }

    # -- both at once --------------------------------------------------------------------------------------

    async def unified(self, given: Unified) -> dict[str, Any]:
        """See `MachineGenerationService.generate_flux_mesh_unified`. Never raises for what can go wrong with a job."""
        marks: list[Any] = [self._mark(given.render_image_path or str(places.RENDER)), given]
        if given.prompt is None:
            marks.append(self._mark(str(places.USER_PROMPT)))
        try:
            return await self._once("call flux_mesh", lambda: self._unified(given), *marks)
        except RunComfyError as error:
            words = f"{error.message}; {error.hint}" if error.hint else error.message
            answer = {"success": False, "error": words, "error_code": error.code, "generation_mode": self._mode}
            return answer | {name: error.details[key] for name, key in _KNOWN_OF_FAILURES if key in error.details}

    async def _unified(self, given: Unified) -> dict[str, Any]:
        prompt = given.prompt
        if prompt is None:
            prompt = await asyncio.to_thread(self._at.user_prompt)
        if not _text(prompt).strip():
            raise InputFileMissing("there is no prompt", hint=f"write one into {places.USER_PROMPT}, or give one")
        picture = await self._snapshot(given.render_image_path or str(places.RENDER))
        drawn = None if given.seed is None else _wished_seed(given.seed, randomize=False)
        steps = {"num_inference_steps": given.steps_flux, "num_steps": given.steps_partpacker}
        applied = apply(FLUX_MESH, steps)

        async def work() -> dict[str, Any]:
            request = JobRequest(FLUX_MESH, image=picture.path, prompt=prompt, seed=_drawn(drawn))
            made = await self._run(request, applied, {places.FLUX_IMAGE: "flux", places.MESH: "mesh"})
            return {
                "success": True,
                "request_id": made.job_id,
                "flux_image_path": str(places.FLUX_IMAGE),
                "mesh_model_path": str(places.MESH),
                "seed_used": made.seeds[NOISE_SEED],
                "steps_flux": given.steps_flux or STEPS_FLUX,
                "steps_partpacker": mesh_parameters(FLUX_MESH, applied.sets).num_steps,
                **self._facts(made, applied),
            }

        return await self._once("flux_mesh", work, picture.sha256, prompt, drawn, applied)

    # -- what all have in common ---------------------------------------------------------------------------

    async def _snapshot(self, path: Any) -> Snapshot:
        name = path_of(path)
        folder = self._engine.folder / "inputs"
        await asyncio.to_thread(sweep, folder)
        await asyncio.to_thread(sweep_runs, runs_folder(self._engine.folder))
        limit = self._engine.app.settings.files.max_input_pixels
        return await asyncio.to_thread(snapshot, self._at.at(name), folder, max_pixels=limit)

    def _mark(self, path: Any) -> str:
        """Return what tells one state of a file from another: calls that find the same one are the same call.

        One look at a file that the caller has just named, on the event loop: while a thread looked, another call with
        the same key could come and go.
        """
        try:
            found = self._at.at(path).stat()
        except (OSError, ValueError, TypeError, RunComfyError):
            return f"{path!r}: none"
        return f"{path!r}: {found.st_dev} {found.st_ino} {found.st_size} {found.st_mtime_ns}"

    async def _run(
        self, request: JobRequest, applied: Applied, publish: Mapping[Path, str], *, picture: Snapshot | None = None
    ) -> Made:
        """Run a workflow and do all that follows from it."""
        limit = self._engine.app.settings.comfy.execution_timeout
        request = replace(request, sets=dict(applied.sets), timeout=limit)
        follow = FollowUp(
            workflow=str(request.workflow),
            sets=dict(applied.sets),
            seed=request.seed or 0,
            root=str(self._at.root),
            publish={place.as_posix(): name for place, name in publish.items()},
            image_sha256=picture.sha256 if picture is not None else "",
            mode=self._mode,
        )
        made = await self._engine.run(Order(request, self._where, follow.as_dict()))
        await follow_up(self._engine, made, follow)
        return made

    async def _publish(self, results: Mapping[Path, Verified]) -> None:
        async with self._engine.publishing:
            await asyncio.to_thread(self._at.publish, results)

    async def _once(self, call: str, work: Any, *parts: Any) -> dict[str, Any]:
        """Do the work, or join the same call that runs already."""
        shown = [_key_part(part) for part in parts]
        key = (call, self._mode, str(self._at.root), json.dumps(shown, sort_keys=True, default=str))
        return dict(await self._engine.once(key, work))

    def _facts(self, made: Made, applied: Applied) -> dict[str, Any]:
        warning = {"warning": made.warning} if made.warning else {}
        return warning | {
            "cost": float(made.cost_usd),
            "job_id": made.job_id,
            "prompt_id": made.prompt_id,
            "generation_mode": self._mode,
            "not_applied": [each.as_dict() for each in applied.not_applied],
        }


STEPS_FLUX: Final = 20
"""Of node 3 in generate_flux_mesh."""
_KNOWN_OF_FAILURES: Final = (
    ("request_id", "job_id"),
    ("request_id", "request_id"),
    ("prompt_id", "prompt_id"),
    ("status", "status"),
)


def _key_part(part: Any) -> Any:
    if isinstance(part, Applied):
        return dict(part.sets)
    return str(part) if not isinstance(part, (str, int, float, bool)) else part


def _text(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise ValueInvalid(f"the prompt is not a text: {foreign_text(prompt, 60)}", hint="give a text")
    return prompt


def _wished_seed(seed: Any, *, randomize: Any) -> int | None:
    """Return the seed that is wished for; None: a random one. Raises ValueInvalid."""
    if randomize or seed is None:
        return None
    if isinstance(seed, float) and seed.is_integer():
        seed = int(seed)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueInvalid(f"seed = {foreign_text(seed, 60)!r} is not a whole number", hint="leave it out")
    return into_range(seed, 0, NOISE_SEED_MAX)


def _drawn(seed: int | None) -> int:
    return random.SystemRandom().randint(1, MESH_SEED_MAX) if seed is None else seed


def _named_seed(seed: int | None) -> int:
    return 0 if seed is None else seed


__all__ = ["Generating", "Unified"]
