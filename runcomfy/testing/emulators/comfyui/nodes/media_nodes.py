"""Nodes of the real server's core that make and save video and sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runcomfy.testing.emulators.comfyui.nodes import media
from runcomfy.testing.emulators.comfyui.nodes.base import InputSpec, NodeClass, NodeContext, NodeResult
from runcomfy.testing.emulators.comfyui.nodes.declare import Declared, combo, modern, real, text, whole
from runcomfy.testing.emulators.comfyui.nodes.values import (
    Audio,
    Images,
    Video,
    graph_metadata,
    temp_prefix,
    write_files,
)

MOST_SAMPLES = 1 << 30
"""Longer sound does not fit the memory of the machine that is emulated, as every machine has such a limit."""


async def create_video(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Pictures at a rate, with sound or without."""
    return NodeResult([Video(inputs["images"], inputs["fps"], inputs.get("audio"))])


async def save_moving(context: NodeContext, images: Images, prefix: str, extension: str, data: Any) -> NodeResult:
    """Write one file of moving pictures; it stands under `images`, marked as animated."""

    def save() -> list[dict[str, str]]:
        target = context.save_path(prefix, width=images.width, height=images.height)
        return write_files(target, [(target.name(extension), data())], "output")

    return NodeResult([], ui={"images": await context.in_thread(save), "animated": [True]})


async def save_video(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """MP4, whatever container and codec are chosen."""
    video: Video = inputs["video"]
    write = lambda: media.mp4(  # noqa: E731
        video.images.frames, video.fps, audio=video.audio, metadata=graph_metadata(context)
    )
    return await save_moving(context, video.images, inputs["filename_prefix"], ".mp4", write)


async def save_webm(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """WEBM, with VP8 whatever codec is chosen."""
    images: Images = inputs["images"]
    write = lambda: media.webm(images.frames, inputs["fps"], metadata=graph_metadata(context))  # noqa: E731
    return await save_moving(context, images, inputs["filename_prefix"], ".webm", write)


async def empty_audio(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Silence."""
    samples = round(inputs["duration"] * inputs["sample_rate"])
    if samples > MOST_SAMPLES:
        wanted = 4 * samples * inputs["channels"]
        raise RuntimeError(f"not enough memory: you tried to allocate {wanted} bytes.")
    return NodeResult([Audio(samples, inputs["sample_rate"], inputs["channels"])])


def sound_saver(
    make: Callable[..., bytes], extension: str, kind: str = "output"
) -> Callable[[NodeContext, dict[str, Any]], Any]:
    """Return the run function of a node that writes one sound file."""

    async def run(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
        def save() -> list[dict[str, str]]:
            prefix = temp_prefix(context) if kind == "temp" else inputs["filename_prefix"]
            target = context.save_path(prefix, kind)
            data = make(inputs["audio"], metadata=graph_metadata(context))
            name = target.name(extension, underscore=False).replace("%batch_num%", "0")
            return write_files(target, [(name, data)], kind)

        return NodeResult([], ui={"audio": await context.in_thread(save)})

    return run


_HIDDEN = {"prompt": ["PROMPT"], "extra_pnginfo": ["EXTRA_PNGINFO"]}
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
_ENCODING: Declared = [
    DYNAMIC,
    {
        "options": [
            {"key": "auto", "inputs": {"required": {}}},
            {"key": "re-encode", "inputs": {"required": {"crf": real(23.0, 0.0, 51.0, 1.0)}}},
        ]
    },
]
_CODEC: Declared = [
    DYNAMIC,
    {
        "options": [
            {"key": "auto", "inputs": {"required": {}}},
            {"key": "h264", "inputs": {"optional": {"encoding": _ENCODING}}},
        ]
    },
]
_CONTAINERS: Declared = [
    DYNAMIC,
    {"options": [{"key": key, "inputs": {"optional": {"codec": _CODEC}}} for key in ("auto", "mp4")]},
]


def _saver(name: str, title: str, run: Any, alias: str, **quality: Declared) -> NodeClass:
    return NodeClass(
        name,
        run,
        InputSpec(
            required={"audio": ["AUDIO", {}], "filename_prefix": text("audio/ComfyUI", multiline=False), **quality},
            hidden=_HIDDEN,
        ),
        output_node=True,
        display_name=title,
        category="audio",
        python_module="comfy_extras.nodes_audio",
        extra_info=modern(0, aliases=[alias]),
    )


CLASSES = (
    NodeClass(
        "CreateVideo",
        create_video,
        InputSpec(
            required={"images": ["IMAGE", {}], "fps": real(30.0, 1.0, 120.0, 1.0)},
            optional={"audio": ["AUDIO", {}]},
        ),
        outputs=("VIDEO",),
        display_name="Create Video",
        category="video",
        description="Create a video from images.",
        python_module="comfy_extras.nodes_video",
        extra_info=modern(1, aliases=["images to video"]),
    ),
    NodeClass(
        "SaveVideo",
        save_video,
        InputSpec(
            required={
                "video": ["VIDEO", {}],
                "filename_prefix": text("video/ComfyUI", multiline=False),
                "format": _CONTAINERS,
            },
            hidden=_HIDDEN,
        ),
        output_node=True,
        display_name="Save Video",
        category="video",
        python_module="comfy_extras.nodes_video",
        extra_info=modern(0, aliases=["export video"], essentials="Basics"),
    ),
    NodeClass(
        "SaveWEBM",
        save_webm,
        InputSpec(
            required={
                "images": ["IMAGE", {}],
                "filename_prefix": text("ComfyUI", multiline=False),
                "codec": combo(["vp9", "av1"]),
                "fps": real(24.0, 0.01, 1000.0, 0.01),
                "crf": real(32.0, 0.0, 63.0, 1.0),
            },
            hidden=_HIDDEN,
        ),
        output_node=True,
        display_name="SaveWEBM",
        category="video",
        python_module="comfy_extras.nodes_video",
        extra_info={**modern(0, aliases=["export webm"]), "experimental": True},
    ),
    NodeClass(
        "EmptyAudio",
        empty_audio,
        InputSpec(
            required={
                "duration": real(60.0, 0.0, float(2**64 - 1), 0.01),
                "sample_rate": whole(44100, 1, 192000, advanced=True),
                "channels": whole(2, 1, 2, advanced=True),
            }
        ),
        outputs=("AUDIO",),
        display_name="Empty Audio",
        category="audio",
        python_module="comfy_extras.nodes_audio",
        extra_info=modern(1, aliases=["blank audio"]),
    ),
    _saver("SaveAudio", "Save Audio (FLAC)", sound_saver(media.flac, ".flac"), "export flac"),
    _saver(
        "SaveAudioMP3",
        "Save Audio (MP3)",
        sound_saver(media.mp3, ".mp3"),
        "export mp3",
        quality=combo(["V0", "128k", "320k"], default="V0"),
    ),
    _saver(
        "SaveAudioOpus",
        "Save Audio (Opus)",
        sound_saver(media.opus, ".opus"),
        "export opus",
        quality=combo(["64k", "96k", "128k", "192k", "320k"], default="128k"),
    ),
    NodeClass(
        "PreviewAudio",
        sound_saver(media.flac, ".flac", "temp"),
        InputSpec(required={"audio": ["AUDIO", {}]}, hidden=_HIDDEN),
        output_node=True,
        display_name="Preview Audio",
        category="audio",
        python_module="comfy_extras.nodes_audio",
        extra_info=modern(0, aliases=["play audio"]),
    ),
)
