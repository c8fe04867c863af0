"""
The generation services, with the signatures, return keys and file places that CONJURE's launcher relies on.

    get_generation_service("cloud").generate_flux_depth_image("data/…/render.png", "a bronze statue", seed=7)

A picture with depth is one run of generate_flux_mesh, which makes the mesh too; the mesh is kept (`memo`), and the call
for it that follows costs nothing. What is asked for is answered by files at CONJURE's fixed places (`places`); the
user's own files, the prompt and the render, are only read.

Where jobs run and how calls get there from any thread is the engine's business (`engine`); the work itself is
`generating`'s. Failures raise, as they do in CONJURE; `LocalComfyUIService` and the unified methods return
`{"success": False, "error": …}`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, ClassVar, Final

from launcher.conjure import hugging_face, places
from launcher.conjure.engine import CLOUD, LOCAL, Engine, shared_engine
from launcher.conjure.errors import ModeUnknown
from launcher.conjure.generating import Generating, Unified
from launcher.conjure.hugging_face import SpacesGenerating
from launcher.conjure.probe import answers
from runcomfy.domain.exceptions import RunComfyError, foreign_text

Call = Callable[[Generating | SpacesGenerating], Coroutine[Any, Any, dict[str, Any]]]
"""What is asked of the work."""

MODES: Final = ("local", "cloud", "serverless", "cloud_legacy", "local_comfyui", "huggingface")
"""Every mode that either revision of CONJURE writes, and the one that its newer menu names."""


class GenerationService(ABC):
    """What CONJURE asks of whatever generates for it."""

    @abstractmethod
    def generate_flux_image(self, prompt: str, seed: int = 0, **kwargs: Any) -> dict[str, Any]:
        """Make a picture from words: `success, image_path, seed_used`."""

    @abstractmethod
    def generate_flux_depth_image(
        self, control_image_path: str, prompt: str, seed: int = 0, **kwargs: Any
    ) -> dict[str, Any]:
        """Make a picture from words over the depth of another: `success, image_path, seed_used`."""

    @abstractmethod
    def generate_3d_model(self, image_path: str, seed: int = 0, **kwargs: Any) -> dict[str, Any]:
        """Make a mesh from a picture: `success, model_path, seed_used`."""

    @abstractmethod
    def is_available(self) -> bool:
        """Return whether the service can be used, quickly."""


class MachineGenerationService(GenerationService):
    """Generates on a ComfyUI: on rented machines or on the user's own computer, which the subclasses say.

    Every method has a twin with `a_` before its name, to be awaited on any event loop; the plain ones block the thread
    they are called from, and no other.
    """

    mode: ClassVar[str]
    where: ClassVar[str]
    fixed_places: ClassVar[bool]
    """Whether pictures from words and meshes have one place each, or one for every seed."""

    def __init__(self, engine: Engine | None = None, *, root: str | None = None) -> None:
        """`engine`: whose loop does the work; None: the one of this process for the settings as they are at each call.

        `root`: the folder that has CONJURE's `data`; None: the working directory, at each call.
        """
        self._given = engine
        self._root = root

    @property
    def _engine(self) -> Engine:
        return self._given or shared_engine()

    def _generating(self) -> Generating | SpacesGenerating:
        return Generating(
            self._engine,
            self._places(),
            mode=self.mode,
            where=self.where,
            fixed_places=self.fixed_places,
        )

    def _places(self) -> places.Places:
        return places.Places() if self._root is None else places.Places(Path(self._root))

    # -- how calls are made --------------------------------------------------------------------------------

    def _run(self, call: Call) -> dict[str, Any]:
        """Have the work done and wait for it."""
        work = self._generating()
        return self._engine.wait(lambda: call(work))

    async def _a_run(self, call: Call) -> dict[str, Any]:
        """Have the work done and await it."""
        work = self._generating()
        return await self._engine.here(lambda: call(work))

    def _ask(self, call: Call) -> dict[str, Any]:
        """Return what the caller gets."""
        return self._told(self._run(call))

    async def _a_ask(self, call: Call) -> dict[str, Any]:
        """Return what the caller gets."""
        return self._told(await self._a_run(call))

    def _told(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Return an answer with what else this service knows of it."""
        return answer

    def _completed(self, asked: Unified) -> Unified:
        """Return what is asked for in one run, with what this service's settings say beside."""
        return asked

    # -- the calls -----------------------------------------------------------------------------------------

    def generate_flux_image(self, prompt: str, seed: int = 0, **kwargs: Any) -> dict[str, Any]:
        """Make a picture from words.

        Parameters: `randomize_seed` (default true in local mode, elsewhere only if no seed is given), `width`, `height`
        (pixels), `num_inference_steps`, `guidance_scale`. Returns `success, image_path, seed_used, cost` (USD),
        `job_id`, `not_applied`.
        Raises RunComfyError: what went wrong with the job.
        """
        return self._ask(lambda work: work.image(prompt, seed, kwargs))

    async def a_generate_flux_image(self, prompt: str, seed: int = 0, **kwargs: Any) -> dict[str, Any]:
        """Await `generate_flux_image`."""
        return await self._a_ask(lambda work: work.image(prompt, seed, kwargs))

    def generate_flux_depth_image(
        self, control_image_path: str, prompt: str, seed: int = 0, **kwargs: Any
    ) -> dict[str, Any]:
        """Make a picture from words over the depth of another, and keep the mesh of the same run.

        Parameters as for `generate_flux_image`; `randomize_seed` is false by default. Returns the same keys.
        Raises PictureMissing (a FileNotFoundError), RunComfyError.
        """
        return self._ask(lambda work: work.depth(control_image_path, prompt, seed, kwargs))

    async def a_generate_flux_depth_image(
        self, control_image_path: str, prompt: str, seed: int = 0, **kwargs: Any
    ) -> dict[str, Any]:
        """Await `generate_flux_depth_image`."""
        return await self._a_ask(lambda work: work.depth(control_image_path, prompt, seed, kwargs))

    def generate_3d_model(self, image_path: str, seed: int = 0, **kwargs: Any) -> dict[str, Any]:
        """Return the mesh of a picture: the one of the run that made the picture, if there is one that fits.

        Parameters: `num_steps`, `cfg_scale`, `grid_res`, `simplify_mesh`, `target_num_faces`. Seed 0 stands for any
        of a picture that a run has made. Otherwise a mesh is made from the picture alone. Returns `success,
        model_path, seed_used, cost` (USD, 0 if nothing ran), `job_id`, `reused`, `not_applied`.
        Raises PictureMissing (a FileNotFoundError), RunComfyError.
        """
        return self._ask(lambda work: work.model(image_path, seed, kwargs))

    async def a_generate_3d_model(self, image_path: str, seed: int = 0, **kwargs: Any) -> dict[str, Any]:
        """Await `generate_3d_model`."""
        return await self._a_ask(lambda work: work.model(image_path, seed, kwargs))

    def generate_flux_mesh_unified(
        self,
        prompt: str | None = None,
        render_image_path: str | None = None,
        seed: int | None = None,
        steps_flux: int | None = None,
        steps_partpacker: int | None = None,
    ) -> dict[str, Any]:
        """Make picture and mesh in one run, from the user's prompt and render unless others are given. Never raises.

        Returns `success, request_id, flux_image_path, mesh_model_path, seed_used, steps_flux, steps_partpacker,
        generation_mode`, or `success, error` and what is known beside.
        """
        given = Unified(prompt, render_image_path, seed, steps_flux, steps_partpacker)
        try:
            asked = self._completed(given)
            return self._told(self._run(lambda work: work.unified(asked)))
        except RunComfyError as error:  # wrong settings; the engine ends
            return {**failure(error), "generation_mode": self.mode}

    async def a_generate_flux_mesh_unified(
        self,
        prompt: str | None = None,
        render_image_path: str | None = None,
        seed: int | None = None,
        steps_flux: int | None = None,
        steps_partpacker: int | None = None,
    ) -> dict[str, Any]:
        """Await `generate_flux_mesh_unified`."""
        given = Unified(prompt, render_image_path, seed, steps_flux, steps_partpacker)
        try:
            asked = self._completed(given)
            return self._told(await self._a_run(lambda work: work.unified(asked)))
        except RunComfyError as error:
            return {**failure(error), "generation_mode": self.mode}

    # -- can it --------------------------------------------------------------------------------------------

    @abstractmethod
    def availability(self) -> tuple[bool, str]:
        """Return whether the service can be used, and if not, why. Never raises."""

    def is_available(self) -> bool:
        """Return whether the service can be used."""
        return self.availability()[0]


class CloudGenerationService(MachineGenerationService):
    """Generates on the account's machines: the dev server if it runs, else one that is rented for the job."""

    mode = "cloud"
    where = CLOUD
    fixed_places = True

    def availability(self) -> tuple[bool, str]:
        """Return whether machines can be rented as this computer is set up. Asks nobody."""
        try:
            cloud = self._engine.app.settings.cloud
        except RunComfyError as error:
            return False, error.message
        given = {
            "RUNCOMFY_USER_ID": cloud.user_id,
            "RUNCOMFY_API_TOKEN": cloud.tokens,
            "RUNCOMFY_WORKFLOW_VERSION_ID": cloud.workflow_version_id,
        }
        missing = [name for name, value in given.items() if not value]
        if missing:
            return False, f"not set: {', '.join(missing)} (in the environment or in credentials.txt)"
        return True, ""


class CloudGenerationService_Legacy(CloudGenerationService):  # noqa: N801 - CONJURE's name
    """The same under the name that CONJURE's newer revision has for it."""

    mode = "cloud_legacy"


class LocalGenerationService(MachineGenerationService):
    """Generates on the user's own ComfyUI, or on Hugging Face Spaces if that is chosen; nothing is rented."""

    mode = "local"
    where = LOCAL
    fixed_places = False

    def __init__(
        self, engine: Engine | None = None, *, root: str | None = None, spaces: hugging_face.Spaces | None = None
    ) -> None:
        """As the others. `spaces`: what calls Hugging Face Spaces, where those are chosen."""
        super().__init__(engine, root=root)
        self._spaces = spaces

    def _on_spaces(self) -> bool:
        """Whether Spaces are chosen. Raises ValueInvalid."""
        return hugging_face.chosen_backend() == hugging_face.HUGGING_FACE

    def _generating(self) -> Generating | SpacesGenerating:
        if self._on_spaces():
            return SpacesGenerating(self._engine, self._places(), mode=self.mode, spaces=self._spaces)
        return super()._generating()

    def availability(self) -> tuple[bool, str]:
        """Return whether the ComfyUI answers; blocks for two seconds at most. Of Spaces nobody is asked."""
        try:
            if self._on_spaces():
                return (True, "") if self._spaces is not None else hugging_face.availability()
            url = self._engine.app.queue_settings.api_base_url
        except RunComfyError as error:
            return False, error.message
        return answers(url)


class HuggingFaceGenerationService(LocalGenerationService):
    """Generates on Hugging Face Spaces, whatever is chosen for local mode."""

    mode = "huggingface"

    def _on_spaces(self) -> bool:
        return True


class LocalComfyUIService(LocalGenerationService):
    """The user's own ComfyUI with the cloud's file places; failures are returned, not raised."""

    mode = "local_comfyui"
    fixed_places = True

    def _on_spaces(self) -> bool:
        return False

    def _ask(self, call: Call) -> dict[str, Any]:
        try:
            return super()._ask(call)
        except RunComfyError as error:
            return failure(error)

    async def _a_ask(self, call: Call) -> dict[str, Any]:
        try:
            return await super()._a_ask(call)
        except RunComfyError as error:
            return failure(error)

    def generate_flux_mesh(self, **kwargs: Any) -> dict[str, Any]:
        """Make picture and mesh from the user's prompt and render: `success, flux_image, mesh_model, prompt_id`."""
        return _flux_mesh(self.generate_flux_mesh_unified(**_unified_only(kwargs)))

    async def a_generate_flux_mesh(self, **kwargs: Any) -> dict[str, Any]:
        """Await `generate_flux_mesh`."""
        return _flux_mesh(await self.a_generate_flux_mesh_unified(**_unified_only(kwargs)))


def failure(error: RunComfyError) -> dict[str, Any]:
    """Return an error as CONJURE reads one from a result."""
    words = f"{error.message}; {error.hint}" if error.hint else error.message
    return {"success": False, "error": words, "error_code": error.code}


def _unified_only(given: dict[str, Any]) -> dict[str, Any]:
    known = ("prompt", "render_image_path", "seed", "steps_flux", "steps_partpacker")
    return {name: value for name, value in given.items() if name in known}


def _flux_mesh(unified: dict[str, Any]) -> dict[str, Any]:
    if not unified["success"]:
        return unified
    names = {"flux_image": "flux_image_path", "mesh_model": "mesh_model_path"}
    return {**unified, **{ours: unified[theirs] for ours, theirs in names.items()}}


def get_generation_service(
    mode: str = "local", engine: Engine | None = None, *, root: str | None = None
) -> GenerationService:
    """Return the service of a mode.

    Raises ModeUnknown (a ValueError), ConfigurationError (settings that are wrong).
    """
    if mode == "serverless":
        from launcher.conjure.serverless import ServerlessGenerationService

        service: GenerationService = ServerlessGenerationService(engine, root=root)
        return service
    kind = _KINDS.get(str(mode))
    if kind is None:
        raise ModeUnknown(
            f"there is no generation mode {foreign_text(mode, 60)!r}", hint=f"known are {', '.join(MODES)}"
        )
    return kind(engine, root=root)


_KINDS: Final[dict[str, type[MachineGenerationService]]] = {
    "local": LocalGenerationService,
    "cloud": CloudGenerationService,
    "cloud_legacy": CloudGenerationService_Legacy,
    "local_comfyui": LocalComfyUIService,
    "huggingface": HuggingFaceGenerationService,
}
