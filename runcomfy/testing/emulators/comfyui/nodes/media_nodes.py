"""Nodes of the core that make, save and show video and audio."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runcomfy.testing.emulators.comfyui.nodes import media
from runcomfy.testing.emulators.comfyui.nodes.base import InputSpec, NodeClass, NodeContext, NodeResult
from runcomfy.testing.emulators.comfyui.nodes.declare import combo, modern, real, text, whole
from runcomfy.testing.emulators.comfyui.nodes.values import (
    Audio,
    Images,
    Video,
    prompt_text,
    temp_prefix,
    write_files,
)

_HIDDEN = {"prompt": ["PROMPT"], "extra_pnginfo": ["EXTRA_PNGINFO"]}
MP3_QUALITIES = ("V0", "128k", "320k")
OPUS_QUALITIES = ("64k", "96k", "128k", "192k", "320k")


def tags_of(context: NodeContext) -> list[tuple[str, str]]:
    """Return what the real server writes into media files: the graph."""
    prompt = prompt_text(context)
    return [] if prompt is None else [("prompt", prompt)]


async def create_video(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Pictures and their rate."""
    return NodeResult([Video(inputs["images"], inputs["fps"], inputs.get("audio"))])


async def _save_frames(
    context: NodeContext, images: Images, fps: float, prefix: str, extension: str, make: Callable[..., bytes]
) -> NodeResult:
    def save() -> list[dict[str, str]]:
        target = context.save_path(prefix, width=images.width, height=images.height)
        data = make(images.frames, fps, tags_of(context))
        return write_files(target, [(target.name(extension), data)], "output")

    return NodeResult([], ui={"images": await context.in_thread(save), "animated": [True]})


async def save_video(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """An MP4 file, told under `images`."""
    video: Video = inputs["video"]
    return await _save_frames(context, video.images, video.fps, inputs["filename_prefix"], ".mp4", media.mp4)


async def save_webm(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A WEBM file, told under `images`."""
    return await _save_frames(context, inputs["images"], inputs["fps"], inputs["filename_prefix"], ".webm", media.webm)


async def empty_audio(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Silence."""
    samples = round(inputs["duration"] * inputs["sample_rate"])
    return NodeResult([Audio(samples, inputs["sample_rate"], inputs["channels"])])


async def _save_audio(
    context: NodeContext, audio: Audio, prefix: str, kind: str, extension: str, make: Callable[..., bytes]
) -> NodeResult:
    def save() -> list[dict[str, str]]:
        target = context.save_path(prefix, kind)
        data = make(audio.samples, audio.rate, audio.channels, tags_of(context))
        return write_files(target, [(target.name(extension, underscore=False), data)], kind)

    return NodeResult([], ui={"audio": await context.in_thread(save)})


async def save_flac(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """FLAC."""
    return await _save_audio(context, inputs["audio"], inputs["filename_prefix"], "output", ".flac", media.flac)


async def save_mp3(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """MP3."""
    return await _save_audio(context, inputs["audio"], inputs["filename_prefix"], "output", ".mp3", media.mp3)


async def save_opus(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Opus."""
    return await _save_audio(context, inputs["audio"], inputs["filename_prefix"], "output", ".opus", media.opus)


async def preview_audio(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """FLAC in the temp folder."""
    return await _save_audio(context, inputs["audio"], temp_prefix(context), "temp", ".flac", media.flac)


def _saver(name: str, run: Any, title: str, module: str, **required: Any) -> NodeClass:
    return NodeClass(
        name,
        run,
        InputSpec(required=required, hidden=_HIDDEN),
        output_node=True,
        display_name=title,
        category="audio" if "audio" in required else "video",
        python_module=f"comfy_extras.{module}",
        extra_info=modern(0),
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
        python_module="comfy_extras.nodes_video",
        extra_info=modern(1),
    ),
    _saver(
        "SaveVideo",
        save_video,
        "Save Video",
        "nodes_video",
        video=["VIDEO", {}],
        filename_prefix=text("video/ComfyUI", multiline=False),
        format=combo(("auto", "mp4"), default="auto"),
    ),
    _saver(
        "SaveWEBM",
        save_webm,
        "Save WEBM",
        "nodes_video",
        images=["IMAGE", {}],
        filename_prefix=text("ComfyUI", multiline=False),
        codec=combo(("vp9", "av1")),
        fps=real(24.0, 0.01, 1000.0, 0.01),
        crf=real(32.0, 0.0, 63.0, 1.0),
    ),
    NodeClass(
        "EmptyAudio",
        empty_audio,
        InputSpec(
            required={
                "duration": real(60.0, 0.0, float(2**64 - 1), 0.01),
                "sample_rate": whole(44100, 1, 192000),
                "channels": whole(2, 1, 2),
            }
        ),
        outputs=("AUDIO",),
        display_name="Empty Audio",
        category="audio",
        python_module="comfy_extras.nodes_audio",
        extra_info=modern(1),
    ),
    _saver(
        "SaveAudio",
        save_flac,
        "Save Audio (FLAC)",
        "nodes_audio",
        audio=["AUDIO", {}],
        filename_prefix=text("audio/ComfyUI", multiline=False),
    ),
    _saver(
        "SaveAudioMP3",
        save_mp3,
        "Save Audio (MP3)",
        "nodes_audio",
        audio=["AUDIO", {}],
        filename_prefix=text("audio/ComfyUI", multiline=False),
        quality=combo(MP3_QUALITIES, default="V0"),
    ),
    _saver(
        "SaveAudioOpus",
        save_opus,
        "Save Audio (Opus)",
        "nodes_audio",
        audio=["AUDIO", {}],
        filename_prefix=text("audio/ComfyUI", multiline=False),
        quality=combo(OPUS_QUALITIES, default="128k"),
    ),
    _saver("PreviewAudio", preview_audio, "Preview Audio", "nodes_audio", audio=["AUDIO", {}]),
)
