"""
The classes of `generate_flux_mesh` that are not plain text-to-image: FLUX with a depth control net, background
removal, and PartPacker's mesh from a picture. Stand-ins all: see `pictures` and `meshes` for what they really do.

Inputs, ranges and outputs are those of the node packs' published definitions (XLabs-AI/x-flux-comfyui,
Fannovel16/comfyui_controlnet_aux, cubiq/ComfyUI_essentials, smthemex/ComfyUI_PartPacker).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from PIL import Image

from runcomfy.testing.emulators.comfyui.nodes import meshes, pictures
from runcomfy.testing.emulators.comfyui.nodes.base import InputSpec, NodeClass, NodeContext, NodeResult
from runcomfy.testing.emulators.comfyui.nodes.declare import choice, flag, real, seed, text, whole
from runcomfy.testing.emulators.comfyui.nodes.sampling import load, sample
from runcomfy.testing.emulators.comfyui.nodes.values import (
    EMULATION_NOTE,
    Conditioning,
    Images,
    Latents,
    Masks,
    stable_random,
)

CLIPS = (
    "clip_g.safetensors",
    "clip_l.safetensors",
    "t5xxl_fp16.safetensors",
    "t5xxl_fp8_e4m3fn.safetensors",
    "t5xxl_fp8_e4m3fn_scaled.safetensors",
)
CLIP_TYPES = ("sdxl", "sd3", "flux", "hunyuan_video", "hidream", "hunyuan_image")
UNETS = ("flux1-dev-fp8.safetensors", "flux1-dev.safetensors", "flux1-schnell.safetensors")
WEIGHT_DTYPES = ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")
CONTROL_MODELS = ("flux-dev", "flux-dev-fp8", "flux-schnell")
CONTROL_NETS = (
    "flux-canny-controlnet-v3.safetensors",
    "flux-depth-controlnet-v3.safetensors",
    "flux-hed-controlnet-v3.safetensors",
)
DEPTH_CHECKPOINTS = ("depth_anything_vitl14.pth", "depth_anything_vitb14.pth", "depth_anything_vits14.pth")
REMBG_MODELS = (
    "u2net: general purpose",
    "u2netp: lightweight general purpose",
    "u2net_human_seg: human segmentation",
    "u2net_cloth_seg: cloths Parsing",
    "silueta: very small u2net",
    "isnet-general-use: general purpose",
    "isnet-anime: anime illustrations",
    "sam: general purpose",
)
REMBG_PROVIDERS = ("CPU", "CUDA", "ROCM", "DirectML", "OpenVINO", "CoreML", "Tensorrt", "Azure")
PARTPACKER_CHECKPOINTS = ("flow.pt",)
PARTPACKER_VAES = ("ae.safetensors", "partpacker_vae.pt", "sdxl_vae.safetensors")

# Seconds before the emulator's speed divides them. The whole graph takes some 4.5, enough to see progress.
LOADING = {"clip": 0.20, "unet": 0.30, "controlnet": 0.20, "rembg": 0.10, "partpacker": 0.30}
FLUX_STEP = 0.06
PARTPACKER_STEP = 0.03

GRID_DIVISOR = 3
"""PartPacker samples a volume of `grid_res` cells each way; a relief of a third of that has as much to show."""
FINEST_RELIEF = 160


@dataclass(frozen=True, slots=True)
class Control:
    """A ControlNetCondition: the depth picture and how far it is followed."""

    depth: Image.Image
    strength: float


async def load_clips(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Two text encoders."""
    files = (inputs["clip_name1"], inputs["clip_name2"])
    return NodeResult([await load(context, "CLIP", *files, seconds=LOADING["clip"])])


async def load_unet(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """The diffusion model."""
    return NodeResult([await load(context, "MODEL", inputs["unet_name"], seconds=LOADING["unet"])])


async def load_controlnet(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """The control net."""
    files = (inputs["model_name"], inputs["controlnet_path"])
    return NodeResult([await load(context, "FluxControlNet", *files, seconds=LOADING["controlnet"])])


async def apply_controlnet(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A depth picture for the sampler."""
    images: Images = inputs["image"]
    return NodeResult([Control(images.frames[0], inputs["strength"])])


async def encode_flux_text(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A prompt for both encoders; the long text counts, and the short one if it differs."""
    texts = dict.fromkeys((inputs["t5xxl"], inputs["clip_l"]))
    return NodeResult([Conditioning("\n".join(texts), inputs["guidance"])])


async def depth_anything(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A depth picture."""
    images: Images = inputs["image"]
    change = lambda frame: pictures.depth_map(frame, inputs["resolution"])  # noqa: E731
    return NodeResult([await context.in_thread(images.map, change)])


async def xlabs_sampler(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """FLUX in the shape of the control picture; sides are rounded down to multiples of 16 (520 becomes 512)."""
    positive: Conditioning = inputs["conditioning"]
    negative: Conditioning = inputs["neg_conditioning"]
    control: Control | None = inputs.get("controlnet_condition")
    words = positive.text + (f"\nnot: {negative.text}" if negative.text.strip() else "")
    words += f"\n{positive.guidance} {inputs['true_gs']}"
    result = await sample(
        context,
        inputs.get("latent_image") or Latents(1024, 1024, 1),
        words,
        inputs["noise_seed"],
        inputs["steps"],
        depth=None if control is None else control.depth,
        strength=1.0 if control is None else control.strength,
        step_seconds=FLUX_STEP,
    )
    return NodeResult([result])


async def rembg_session(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A session of the background remover."""
    return NodeResult([await load(context, "REMBG_SESSION", inputs["model"], seconds=LOADING["rembg"])])


async def remove_background(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Pictures with alpha, and the alpha as a mask."""
    images: Images = inputs["image"]
    cut = await context.in_thread(images.map, pictures.without_background)
    return NodeResult([cut, Masks(tuple(frame.getchannel("A") for frame in cut.frames))])


async def load_partpacker(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """PartPacker's two models."""
    files = (inputs["checkpoint"], inputs["vae"], inputs["dino"])
    return NodeResult([await load(context, "MODEL_PartPacker", *files, seconds=LOADING["partpacker"])])


def mesh_of(picture: Image.Image, number: int, *, grid_res: int, most_faces: int | None) -> meshes.Mesh:
    """Return the relief that stands for a generated mesh."""
    longest = min(grid_res // GRID_DIVISOR, FINEST_RELIEF)
    if most_faces is not None:
        # A square relief of n cells each way has 2 n^2 faces in front, 8 n at its sides and 4 n behind.
        longest = min(longest, int(math.sqrt(9 + most_faces / 2)) - 3 + 1)
    return meshes.relief(picture, longest=max(longest, 8), noise=stable_random("mesh", number).randbytes(64))


async def partpacker_sampler(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A mesh, as two kinds of value, and the path of a file that the node writes by itself."""
    images: Images = inputs["image"]
    most_faces = inputs["target_num_faces"] if inputs["simplify_mesh"] else None

    def build() -> meshes.Mesh:
        return mesh_of(images.frames[0], inputs["seed"], grid_res=inputs["grid_res"], most_faces=most_faces)

    mesh = await context.in_thread(build)
    steps = inputs["steps"]
    for step in range(1, steps + 1):
        await context.sleep(PARTPACKER_STEP)
        await context.progress(step, steps)

    def save() -> str:
        target = context.save_path("partpacker/partpacker")
        path = target.folder / target.name(".glb")
        path.write_bytes(meshes.glb(mesh, extras={"emulator": EMULATION_NOTE}))
        return str(path)

    return NodeResult([mesh, mesh, await context.in_thread(save)])


_XLABS = "custom_nodes.x-flux-comfyui"
_ESSENTIALS = "custom_nodes.comfyui_essentials"
_PARTPACKER = "custom_nodes.ComfyUI_PartPacker"

CLASSES = (
    NodeClass(
        "DualCLIPLoader",
        load_clips,
        InputSpec(
            required={"clip_name1": choice(CLIPS), "clip_name2": choice(CLIPS), "type": choice(CLIP_TYPES)},
            optional={"device": choice(("default", "cpu"), advanced=True)},
        ),
        outputs=("CLIP",),
        display_name="DualCLIPLoader",
        category="advanced/loaders",
    ),
    NodeClass(
        "UNETLoader",
        load_unet,
        InputSpec(required={"unet_name": choice(UNETS), "weight_dtype": choice(WEIGHT_DTYPES, advanced=True)}),
        outputs=("MODEL",),
        display_name="Load Diffusion Model",
        category="advanced/loaders",
    ),
    NodeClass(
        "CLIPTextEncodeFlux",
        encode_flux_text,
        InputSpec(
            required={
                "clip": ["CLIP", {}],
                "clip_l": ["STRING", {"multiline": True, "dynamicPrompts": True}],
                "t5xxl": ["STRING", {"multiline": True, "dynamicPrompts": True}],
                "guidance": real(3.5, 0.0, 100.0, 0.1),
            }
        ),
        outputs=("CONDITIONING",),
        category="advanced/conditioning/flux",
        python_module="comfy_extras.nodes_flux",
    ),
    NodeClass(
        "LoadFluxControlNet",
        load_controlnet,
        InputSpec(required={"model_name": choice(CONTROL_MODELS), "controlnet_path": choice(CONTROL_NETS)}),
        outputs=("FluxControlNet",),
        output_names=("ControlNet",),
        display_name="Load Flux ControlNet",
        category="XLabsNodes",
        python_module=_XLABS,
    ),
    NodeClass(
        "ApplyFluxControlNet",
        apply_controlnet,
        InputSpec(
            required={
                "controlnet": ["FluxControlNet"],
                "image": ["IMAGE"],
                "strength": real(1.0, 0.0, 100.0, 0.01),
            },
            optional={"controlnet_condition": ["ControlNetCondition", {"default": None}]},
        ),
        outputs=("ControlNetCondition",),
        output_names=("controlnet_condition",),
        display_name="Apply Flux ControlNet",
        category="XLabsNodes",
        python_module=_XLABS,
    ),
    NodeClass(
        "XlabsSampler",
        xlabs_sampler,
        InputSpec(
            required={
                "model": ["MODEL"],
                "conditioning": ["CONDITIONING"],
                "neg_conditioning": ["CONDITIONING"],
                "noise_seed": seed(),
                "steps": whole(20, 1, 100),
                "timestep_to_start_cfg": whole(20, 0, 100),
                "true_gs": real(3.0, 0.0, 100.0),
                "image_to_image_strength": real(0.0, 0.0, 1.0, 0.01),
                "denoise_strength": real(1.0, 0.0, 1.0, 0.01),
            },
            optional={
                "latent_image": ["LATENT", {"default": None}],
                "controlnet_condition": ["ControlNetCondition", {"default": None}],
            },
        ),
        outputs=("LATENT",),
        output_names=("latent",),
        display_name="Xlabs Sampler",
        category="XLabsNodes",
        python_module=_XLABS,
    ),
    NodeClass(
        "DepthAnythingPreprocessor",
        depth_anything,
        InputSpec(
            required={"image": ["IMAGE"]},
            optional={
                "ckpt_name": choice(DEPTH_CHECKPOINTS, default=DEPTH_CHECKPOINTS[0]),
                "resolution": whole(512, 64, 16384, 64),
            },
        ),
        outputs=("IMAGE",),
        display_name="Depth Anything",
        category="ControlNet Preprocessors/Normal and Depth Estimators",
        python_module="custom_nodes.comfyui_controlnet_aux",
    ),
    NodeClass(
        "RemBGSession+",
        rembg_session,
        InputSpec(required={"model": choice(REMBG_MODELS), "providers": choice(REMBG_PROVIDERS)}),
        outputs=("REMBG_SESSION",),
        display_name="🔧 RemBG Session",
        category="essentials/segmentation",
        python_module=_ESSENTIALS,
    ),
    NodeClass(
        "ImageRemoveBackground+",
        remove_background,
        InputSpec(required={"rembg_session": ["REMBG_SESSION"], "image": ["IMAGE"]}),
        outputs=("IMAGE", "MASK"),
        display_name="🔧 Image Remove Background",
        category="essentials/image manipulation",
        python_module=_ESSENTIALS,
    ),
    NodeClass(
        "PartPacker_Loader",
        load_partpacker,
        InputSpec(
            required={
                "checkpoint": choice(["none", *PARTPACKER_CHECKPOINTS]),
                "vae": choice(["none", *PARTPACKER_VAES]),
                "dino": text("facebook/dinov2-giant"),
                "cpu_offload": flag(True),
            }
        ),
        outputs=("MODEL_PartPacker",),
        output_names=("model",),
        display_name="PartPacker_Loader",
        category="PartPacker",
        python_module=_PARTPACKER,
    ),
    NodeClass(
        "PartPacker_Sampler",
        partpacker_sampler,
        InputSpec(
            required={
                "model": ["MODEL_PartPacker"],
                "image": ["IMAGE"],
                "target_num_faces": whole(100000, 1000, 2**31 - 1),
                "grid_res": whole(384, 128, 2048, 8),
                "seed": seed(2**31 - 1),
                "steps": whole(50, 3, 1024),
                "cfg_scale": real(7.0, 1.0, 20.0, 0.1),
                "simplify_mesh": flag(False),
            }
        ),
        outputs=("TRIMESH", "MESH", "STRING"),
        output_names=("trimesh", "mesh", "path"),
        display_name="PartPacker_Sampler",
        category="PartPacker",
        python_module=_PARTPACKER,
    ),
)
