"""Nodes of the core's text-to-image set: loaders, prompts, latents, samplers. No model is loaded and none runs.

A loader gives the name of its file, a prompt its text, and a sampler draws with `pictures.render` while it reports
steps and previews as a real one does. Which files may be named is fixed here, so that a wrong name is refused as on a
machine that lacks the model.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from PIL import Image

from runcomfy.testing.emulators.comfyui.nodes import pictures
from runcomfy.testing.emulators.comfyui.nodes.base import InputSpec, NodeClass, NodeContext, NodeResult
from runcomfy.testing.emulators.comfyui.nodes.declare import choice, real, seed, text, whole
from runcomfy.testing.emulators.comfyui.nodes.values import (
    EMULATION_NOTE,
    Conditioning,
    Images,
    Latents,
    Model,
    prompt_text,
    write_files,
)

CHECKPOINTS = (
    "sd_xl_base_1.0.safetensors",
    "sd_xl_turbo_1.0_fp16.safetensors",
    "v1-5-pruned-emaonly-fp16.safetensors",
    "v1-5-pruned-emaonly.safetensors",
)
LORAS = ("lcm_lora_sdxl.safetensors", "pixel-art-xl.safetensors")
VAES = ("ae.safetensors", "partpacker_vae.pt", "sdxl_vae.safetensors", "vae-ft-mse-840000-ema-pruned.safetensors")
SAMPLERS = (
    "euler",
    "euler_ancestral",
    "heun",
    "dpm_2",
    "lms",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "ddpm",
    "lcm",
    "ddim",
    "uni_pc",
)
SCHEDULERS = ("simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal", "linear_quadratic")

LOADING_SECONDS = 0.15
"""What a model file takes to load, before the emulator's speed divides it."""
STEP_SECONDS = 0.05
"""What one step of a sampler takes, before the emulator's speed divides it."""


async def load(context: NodeContext, kind: str, *files: str, seconds: float = LOADING_SECONDS) -> Model:
    """Take as long as loading a model file and return its name."""
    await context.sleep(seconds)
    return Model(kind, files)


async def sample(
    context: NodeContext,
    latent: Latents,
    prompt: str,
    noise_seed: int,
    steps: int,
    *,
    depth: Image.Image | None = None,
    strength: float = 1.0,
    step_seconds: float = STEP_SECONDS,
) -> Latents:
    """Draw a batch, reporting each step with a preview of the first picture.

    Width and height become multiples of 16, as latents have them.
    """
    width, height = (max(16, side // 16 * 16) for side in (latent.width, latent.height))
    frames = []
    for number in range(latent.batch_size):
        arguments = (depth, prompt, (noise_seed + number) % 2**64, steps, width, height, strength)
        frames.append(await context.in_thread(pictures.render, *arguments))
    for step in range(1, steps + 1):
        await context.sleep(step_seconds)
        await context.progress(step, steps, pictures.preview_frame(frames[0], noise_seed, step, steps))
    return Latents(width, height, latent.batch_size, Images(tuple(frames)))


async def load_checkpoint(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Three parts of one file."""
    name = inputs["ckpt_name"]
    await context.sleep(LOADING_SECONDS)
    return NodeResult([Model(kind, (name,)) for kind in ("MODEL", "CLIP", "VAE")])


async def load_lora(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """The same models, with one more file behind their names."""
    await context.sleep(LOADING_SECONDS / 3)
    parts: tuple[Model, Model] = (inputs["model"], inputs["clip"])
    return NodeResult([Model(part.kind, (*part.files, inputs["lora_name"])) for part in parts])


async def load_vae(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A VAE."""
    return NodeResult([await load(context, "VAE", inputs["vae_name"])])


async def encode_text(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A prompt."""
    return NodeResult([Conditioning(inputs["text"])])


async def empty_latent(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A size, in multiples of 8."""
    width, height = (inputs[side] // 8 * 8 for side in ("width", "height"))
    return NodeResult([Latents(width, height, inputs["batch_size"])])


async def ksampler(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A picture from a prompt; a latent that holds one already gives the shape when denoise is below 1."""
    latent: Latents = inputs["latent_image"]
    positive: Conditioning = inputs["positive"]
    denoise = inputs["denoise"]
    depth = None
    if latent.pictures is not None and denoise < 1.0:
        depth = pictures.depth_map(latent.pictures.frames[0], 512)
    # Settings that would change a real picture change this one too.
    words = "\n".join(
        str(part)
        for part in (
            positive.text,
            inputs["negative"].text,
            inputs["cfg"],
            inputs["sampler_name"],
            inputs["scheduler"],
            *inputs["model"].files,
        )
    )
    result = await sample(
        context, latent, words, inputs["seed"], inputs["steps"], depth=depth, strength=1.0 - denoise / 2
    )
    return NodeResult([result])


def decoded(latent: Latents) -> Images:
    """Return the pictures of a latent; one that no sampler has seen is grey, as zeros decode."""
    if latent.pictures is not None:
        return latent.pictures
    return Images((Image.new("RGB", (latent.width, latent.height), (127, 123, 118)),) * latent.batch_size)


async def vae_decode(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Pictures out of a latent."""
    await context.sleep(STEP_SECONDS)
    return NodeResult([decoded(inputs["samples"])])


async def vae_encode(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A latent out of pictures, cut to multiples of 8."""
    images: Images = inputs["pixels"]
    width, height = (max(8, side // 8 * 8) for side in (images.width, images.height))
    cut = images.map(lambda frame: frame.convert("RGB").crop((0, 0, width, height)))
    return NodeResult([Latents(width, height, len(cut.frames), cut)])


def latent_bytes(latent: Latents, prompt: str | None) -> bytes:
    """Return a safetensors file of the latent's shape: the picture's brightness, once per channel."""
    columns, rows = latent.width // 8, latent.height // 8
    values = bytearray()
    frames = decoded(latent).frames if latent.pictures is not None else ()
    for number in range(latent.batch_size):
        grey = frames[number].convert("L").resize((columns, rows)).tobytes() if frames else bytes(columns * rows)
        plane = struct.pack(f"<{len(grey)}f", *(value / 127.5 - 1.0 if frames else 0.0 for value in grey))
        values += plane * 4
    metadata = {"emulator": EMULATION_NOTE} | ({} if prompt is None else {"prompt": prompt})
    header: dict[str, Any] = {
        "__metadata__": metadata,
        "latent_format_version_0": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]},
        "latent_tensor": {
            "dtype": "F32",
            "shape": [latent.batch_size, 4, rows, columns],
            "data_offsets": [0, len(values)],
        },
    }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded + bytes(values)


async def save_latent(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A latent as a file."""

    def save() -> list[dict[str, str]]:
        target = context.save_path(inputs["filename_prefix"])
        data = latent_bytes(inputs["samples"], prompt_text(context))
        return write_files(target, [(target.name(".latent"), data)], "output")

    return NodeResult([], ui={"latents": await context.in_thread(save)})


def _core(name: str, run: Any, title: str, category: str, outputs: tuple[str, ...], **more: Any) -> NodeClass:
    return NodeClass(name, run, outputs=outputs, display_name=title, category=category, **more)


CLASSES = (
    _core(
        "CheckpointLoaderSimple",
        load_checkpoint,
        "Load Checkpoint",
        "loaders",
        ("MODEL", "CLIP", "VAE"),
        inputs=InputSpec(required={"ckpt_name": choice(CHECKPOINTS, tooltip="The name of the checkpoint to load.")}),
    ),
    _core(
        "LoraLoader",
        load_lora,
        "Load LoRA",
        "loaders",
        ("MODEL", "CLIP"),
        inputs=InputSpec(
            required={
                "model": ["MODEL"],
                "clip": ["CLIP"],
                "lora_name": choice(LORAS, tooltip="The name of the LoRA."),
                "strength_model": real(1.0, -100.0, 100.0, 0.01),
                "strength_clip": real(1.0, -100.0, 100.0, 0.01),
            }
        ),
    ),
    _core(
        "VAELoader",
        load_vae,
        "Load VAE",
        "loaders",
        ("VAE",),
        inputs=InputSpec(required={"vae_name": choice(VAES)}),
    ),
    _core(
        "CLIPTextEncode",
        encode_text,
        "CLIP Text Encode (Prompt)",
        "conditioning",
        ("CONDITIONING",),
        inputs=InputSpec(
            required={
                "text": ["STRING", {"multiline": True, "dynamicPrompts": True, "tooltip": "The text to be encoded."}],
                "clip": ["CLIP", {"tooltip": "The CLIP model used for encoding the text."}],
            }
        ),
    ),
    _core(
        "EmptyLatentImage",
        empty_latent,
        "Empty Latent Image",
        "latent",
        ("LATENT",),
        inputs=InputSpec(
            required={
                "width": whole(512, 16, 16384, 8, tooltip="The width of the latent images in pixels."),
                "height": whole(512, 16, 16384, 8, tooltip="The height of the latent images in pixels."),
                "batch_size": whole(1, 1, 4096, tooltip="The number of latent images in the batch."),
            }
        ),
    ),
    _core(
        "KSampler",
        ksampler,
        "KSampler",
        "sampling",
        ("LATENT",),
        inputs=InputSpec(
            required={
                "model": ["MODEL", {"tooltip": "The model used for denoising the input latent."}],
                "seed": seed(control_after_generate=True, tooltip="The random seed used for creating the noise."),
                "steps": whole(20, 1, 10000, tooltip="The number of steps used in the denoising process."),
                "cfg": real(8.0, 0.0, 100.0, 0.1, round=0.01),
                "sampler_name": choice(SAMPLERS),
                "scheduler": choice(SCHEDULERS),
                "positive": ["CONDITIONING"],
                "negative": ["CONDITIONING"],
                "latent_image": ["LATENT", {"tooltip": "The latent image to denoise."}],
                "denoise": real(1.0, 0.0, 1.0, 0.01),
            }
        ),
    ),
    _core(
        "VAEDecode",
        vae_decode,
        "VAE Decode",
        "latent",
        ("IMAGE",),
        inputs=InputSpec(required={"samples": ["LATENT"], "vae": ["VAE"]}),
    ),
    _core(
        "VAEEncode",
        vae_encode,
        "VAE Encode",
        "latent",
        ("LATENT",),
        inputs=InputSpec(required={"pixels": ["IMAGE"], "vae": ["VAE"]}),
    ),
    _core(
        "SaveLatent",
        save_latent,
        "Save Latent",
        "experimental",
        (),
        inputs=InputSpec(
            required={"samples": ["LATENT"], "filename_prefix": text("latents/ComfyUI")},
            hidden={"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"},
        ),
        output_node=True,
    ),
)
