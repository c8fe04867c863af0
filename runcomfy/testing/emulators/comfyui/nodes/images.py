"""Nodes of the real server's core that make, load, change, show and save pictures."""

from __future__ import annotations

import errno
import hashlib
import io
import math
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageChops, ImageFilter, UnidentifiedImageError

from runcomfy.testing.emulators.comfyui.nodes.base import (
    Folders,
    Inputs,
    InputSpec,
    NodeClass,
    NodeContext,
    NodeResult,
)
from runcomfy.testing.emulators.comfyui.nodes.declare import aliases, choice, combo, modern, real, text, whole
from runcomfy.testing.emulators.comfyui.nodes.values import (
    EMULATION_NOTE,
    Images,
    Masks,
    deep_png_bytes,
    png_bytes,
    prompt_text,
    temp_prefix,
    write_files,
)

UPSCALE_METHODS = ("nearest-exact", "bilinear", "area", "bicubic", "lanczos")
CROPS = ("disabled", "center")
CHANNELS = ("red", "green", "blue", "alpha")
MAX_RESOLUTION = 16384
WEBP_METHODS = {"default": 4, "fastest": 0, "slowest": 6}

_FILTERS = {
    "nearest-exact": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# Newer servers open pictures with PyAV, whose errors have these names; clients see them in `exception_type`.
_AvNotFound = type("FileNotFoundError", (FileNotFoundError,), {"__module__": "av.error"})
_AvInvalidData = type("InvalidDataError", (ValueError,), {"__module__": "av.error"})


async def empty_image(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """One colour, `0xRRGGBB`."""
    color = inputs["color"]
    rgb = (color >> 16 & 255, color >> 8 & 255, color & 255)
    frame = Image.new("RGB", (inputs["width"], inputs["height"]), rgb)
    return NodeResult([Images((frame,) * inputs["batch_size"])])


def input_pictures(folders: Folders) -> InputSpec:
    """LoadImage lists what lies in the input folder itself, not below it."""
    names = sorted(path.name for path in folders.input.iterdir() if path.is_file()) if folders.input.is_dir() else []
    return InputSpec(required={"image": [names, {"image_upload": True}]})


def picture_is_there(folders: Folders, inputs: Inputs) -> bool | str:
    """LoadImage's own check; a name may lead into a folder, or to another kind of folder (`a.png [output]`)."""
    name = inputs["image"]
    return folders.annotated(name).is_file() or f"Invalid image file: {name}"


def picture_digest(folders: Folders, inputs: Inputs) -> Any:
    """LoadImage runs again when the file's content has changed."""
    try:
        return hashlib.sha256(folders.annotated(inputs["image"]).read_bytes()).hexdigest()
    except OSError:
        return math.nan


def read_picture(folders: Folders, name: str) -> tuple[Image.Image, Image.Image]:
    """Return a picture without its alpha, and the mask: what is transparent, white.

    Raises what the real server raises for files that are not there or not pictures.
    """
    path = folders.annotated(name)
    try:
        with Image.open(path) as opened:
            opened.seek(0)
            picture = opened.convert("RGBA") if opened.has_transparency_data else opened.convert("RGB")
    except FileNotFoundError:
        raise _AvNotFound(errno.ENOENT, "No such file or directory", str(path)) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        message = f"[Errno 1094995529] Invalid data found when processing input: '{path}'"
        raise _AvInvalidData(message) from None
    if picture.mode == "RGBA":
        return picture.convert("RGB"), ImageChops.invert(picture.getchannel("A"))
    return picture, Image.new("L", (64, 64), 0)


async def load_image(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A picture of the input folder, read when the node runs and not before."""
    picture, mask = await context.in_thread(read_picture, context.folders, inputs["image"])
    return NodeResult([Images((picture,)), Masks((mask,))])


def scaled(picture: Image.Image, width: int, height: int, method: str, crop: str) -> Image.Image:
    """Return the picture in that size; `center` cuts what does not fit its shape."""
    if crop == "center":
        shape = width / height
        cut_w = min(picture.width, round(picture.height * shape))
        cut_h = min(picture.height, round(picture.width / shape))
        left, top = (picture.width - cut_w) // 2, (picture.height - cut_h) // 2
        picture = picture.crop((left, top, left + cut_w, top + cut_h))
    return picture.resize((width, height), _FILTERS[method])


async def image_scale(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A side of 0 follows from the other."""
    images: Images = inputs["image"]
    width, height = inputs["width"], inputs["height"]
    if width == 0 and height == 0:
        return NodeResult([images])
    width = width or max(1, round(images.width * height / images.height))
    height = height or max(1, round(images.height * width / images.width))
    change = lambda frame: scaled(frame, width, height, inputs["upscale_method"], inputs["crop"])  # noqa: E731
    return NodeResult([await context.in_thread(images.map, change)])


async def image_scale_by(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Both sides times a factor."""
    images: Images = inputs["image"]
    width = max(1, round(images.width * inputs["scale_by"]))
    height = max(1, round(images.height * inputs["scale_by"]))
    change = lambda frame: scaled(frame, width, height, inputs["upscale_method"], "disabled")  # noqa: E731
    return NodeResult([await context.in_thread(images.map, change)])


async def image_blur(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A Gaussian blur, cut off at `blur_radius`."""
    radius = min(inputs["sigma"], inputs["blur_radius"])
    change = lambda frame: frame.filter(ImageFilter.GaussianBlur(radius))  # noqa: E731
    return NodeResult([await context.in_thread(inputs["image"].map, change)])


async def image_invert(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """The negative; alpha is a channel like the others."""
    return NodeResult([await context.in_thread(inputs["image"].map, ImageChops.invert)])


async def image_batch(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """The pictures of both, the second ones in the size of the first."""
    first: Images = inputs["image1"]
    second: Images = inputs["image2"]
    mode = first.frames[0].mode
    fitted = second.map(lambda frame: scaled(frame, first.width, first.height, "bilinear", "center").convert(mode))
    return NodeResult([Images(first.frames + fitted.frames)])


async def image_to_mask(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """One channel of each picture."""
    band = inputs["channel"][0].upper()
    frames = (frame if band in frame.getbands() else frame.convert("RGBA") for frame in inputs["image"].frames)
    return NodeResult([Masks(tuple(frame.getchannel(band) for frame in frames))])


def encoded(images: Images, encode: Callable[[Image.Image], bytes]) -> list[bytes]:
    """Return a file for each picture; equal pictures are encoded once."""
    done: dict[int, bytes] = {}
    for frame in images.frames:
        if id(frame) not in done:
            done[id(frame)] = encode(frame)
    return [done[id(frame)] for frame in images.frames]


def save_pictures(
    context: NodeContext,
    images: Images,
    prefix: str,
    kind: str = "output",
    *,
    compress_level: int = 4,
    underscore: bool = True,
    encode: Callable[[Image.Image], bytes] | None = None,
) -> list[dict[str, str]]:
    """Write each picture as PNG and return the references. `encode` makes a file of a picture, if not the usual one."""
    target = context.save_path(prefix, kind, width=images.width, height=images.height)
    encode = encode or (lambda frame: png_bytes(frame, context, compress_level=compress_level))
    files = [
        (target.name(".png", index=number, underscore=underscore).replace("%batch_num%", str(number)), data)
        for number, data in enumerate(encoded(images, encode))
    ]
    return write_files(target, files, kind)


async def save_image(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """One file for each picture of the batch."""
    images = inputs["images"]
    saved = await context.in_thread(save_pictures, context, images, inputs["filename_prefix"])
    return NodeResult([images], ui={"images": saved})


def srgb_of_linear(value: float) -> float:
    """Return the sRGB value of a linear light from 0 to 1."""
    return 12.92 * value if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055


def advanced_png(frame: Image.Image, context: NodeContext, depth: str, space: str) -> bytes:
    """Return a PNG file of 8 or 16 bits a channel; pictures that hold linear light are written as sRGB."""
    shares = [value / 255 if space == "sRGB" else srgb_of_linear(value / 255) for value in range(256)]
    if depth == "16-bit":
        return deep_png_bytes(frame, context, [round(65535 * share) for share in shares])
    if space != "sRGB":
        table = [round(255 * share) for share in shares] * 3
        frame = frame.point(table + list(range(256)) if frame.mode == "RGBA" else table)
    return png_bytes(frame, context)


async def save_image_advanced(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """PNG with a choice of depth and of the colour space that comes in."""
    depth, space = inputs["format.bit_depth"], inputs["format.input_color_space"]

    def save() -> list[dict[str, str]]:
        encode = lambda frame: advanced_png(frame, context, depth, space)  # noqa: E731
        return save_pictures(context, inputs["images"], inputs["filename_prefix"], underscore=False, encode=encode)

    return NodeResult([], ui={"images": await context.in_thread(save)})


async def preview_image(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """The same into the temp folder, quickly."""
    images, prefix = inputs["images"], temp_prefix(context)
    save = lambda: save_pictures(context, images, prefix, "temp", compress_level=1)  # noqa: E731
    return NodeResult([images], ui={"images": await context.in_thread(save)})


async def mask_preview(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A mask as a grey picture in the temp folder."""
    masks: Masks = inputs["mask"]
    images = Images(tuple(frame.convert("RGB") for frame in masks.frames))
    prefix = temp_prefix(context)
    save = lambda: save_pictures(context, images, prefix, "temp", compress_level=1)  # noqa: E731
    return NodeResult([], ui={"images": await context.in_thread(save), "animated": [False]})


async def image_compare(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Two batches side by side, under keys of their own."""
    ui: dict[str, list[dict[str, str]]] = {"a_images": [], "b_images": []}
    for side in ("a", "b"):
        images = inputs.get(f"image_{side}")
        if images is not None:
            prefix = temp_prefix(context, f"comfy.compare.{side}")
            ui[f"{side}_images"] = await context.in_thread(save_pictures, context, images, prefix, "temp")
    return NodeResult([], ui=ui)


def animated_webp(images: Images, context: NodeContext, options: Inputs) -> bytes:
    """Return a WEBP animation; the graph stands in the Exif tags, as the real server writes it."""
    exif = Image.Exif()
    prompt = prompt_text(context)
    if prompt is not None:
        exif[0x0110] = f"prompt:{prompt}"
    exif[0x0131] = EMULATION_NOTE
    data = io.BytesIO()
    images.frames[0].save(
        data,
        format="WEBP",
        save_all=True,
        append_images=list(images.frames[1:]),
        duration=int(1000.0 / options["fps"]),
        exif=exif,
        lossless=options["lossless"],
        quality=options["quality"],
        method=WEBP_METHODS[options["method"]],
    )
    return data.getvalue()


def animated_png(images: Images, context: NodeContext, options: Inputs) -> bytes:
    """Return an APNG animation."""
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    prompt = prompt_text(context)
    if prompt is not None:
        info.add(b"comf", b"prompt\0" + prompt.encode("latin-1", "strict"), after_idat=True)
    info.add(b"comf", b"emulator\0" + EMULATION_NOTE.encode(), after_idat=True)
    data = io.BytesIO()
    images.frames[0].save(
        data,
        format="PNG",
        pnginfo=info,
        compress_level=options["compress_level"],
        save_all=True,
        duration=int(1000.0 / options["fps"]),
        append_images=list(images.frames[1:]),
    )
    return data.getvalue()


async def save_animation(context: NodeContext, inputs: dict[str, Any], make: Any, extension: str) -> NodeResult:
    """One file for the whole batch."""
    images: Images = inputs["images"]

    def save() -> list[dict[str, str]]:
        target = context.save_path(inputs["filename_prefix"], width=images.width, height=images.height)
        return write_files(target, [(target.name(extension), make(images, context, inputs))], "output")

    return NodeResult([], ui={"images": await context.in_thread(save), "animated": [True]})


async def save_animated_webp(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """See `animated_webp`."""
    return await save_animation(context, inputs, animated_webp, ".webp")


async def save_animated_png(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """See `animated_png`."""
    return await save_animation(context, inputs, animated_png, ".png")


_HIDDEN = {"prompt": "PROMPT", "extra_pnginfo": "EXTRA_PNGINFO"}
_HIDDEN_V3 = {"prompt": ["PROMPT"], "extra_pnginfo": ["EXTRA_PNGINFO"]}
_PREFIX_TIP = (
    "The prefix for the file to save. This may include formatting information such as %date:yyyy-MM-dd% or"
    " %Empty Latent Image.width% to include values from nodes."
)
_PNG_FORMAT = {
    "key": "png",
    "inputs": {
        "required": {
            "bit_depth": combo(["8-bit", "16-bit"], default="8-bit"),
            "input_color_space": combo(["sRGB", "linear"], default="sRGB"),
        }
    },
}

CLASSES = (
    NodeClass(
        "EmptyImage",
        empty_image,
        InputSpec(
            required={
                "width": whole(512, 1, MAX_RESOLUTION, 1),
                "height": whole(512, 1, MAX_RESOLUTION, 1),
                "batch_size": whole(1, 1, 4096),
                "color": whole(0, 0, 0xFFFFFF, 1, display="color"),
            }
        ),
        outputs=("IMAGE",),
        display_name="Empty Image",
        category="image",
    ),
    NodeClass(
        "LoadImage",
        load_image,
        input_pictures,
        outputs=("IMAGE", "MASK"),
        display_name="Load Image",
        category="image",
        extra_info=aliases(
            "load image",
            "open image",
            "import image",
            "image input",
            "upload image",
            "read image",
            "image loader",
            essentials="Basics",
        ),
        validate=picture_is_there,
        validated_inputs=frozenset({"image"}),
        fingerprint=picture_digest,
    ),
    NodeClass(
        "ImageScale",
        image_scale,
        InputSpec(
            required={
                "image": ["IMAGE"],
                "upscale_method": choice(UPSCALE_METHODS),
                "width": whole(512, 0, MAX_RESOLUTION, 1),
                "height": whole(512, 0, MAX_RESOLUTION, 1),
                "crop": choice(CROPS),
            }
        ),
        outputs=("IMAGE",),
        display_name="Upscale Image",
        category="image/upscaling",
    ),
    NodeClass(
        "ImageScaleBy",
        image_scale_by,
        InputSpec(
            required={
                "image": ["IMAGE"],
                "upscale_method": choice(UPSCALE_METHODS),
                "scale_by": real(1.0, 0.01, 8.0, 0.01),
            }
        ),
        outputs=("IMAGE",),
        display_name="Upscale Image By",
        category="image/upscaling",
    ),
    NodeClass(
        "ImageBlur",
        image_blur,
        InputSpec(
            required={
                "image": ["IMAGE", {}],
                "blur_radius": whole(1, 1, 31, 1),
                "sigma": real(1.0, 0.1, 10.0, 0.1),
            }
        ),
        outputs=("IMAGE",),
        display_name="Blur Image",
        category="image/filters",
        python_module="comfy_extras.nodes_post_processing",
        extra_info=modern(1),
    ),
    NodeClass(
        "ImageInvert",
        image_invert,
        InputSpec(required={"image": ["IMAGE"]}),
        outputs=("IMAGE",),
        display_name="Invert Image",
        category="image",
    ),
    NodeClass(
        "ImageBatch",
        image_batch,
        InputSpec(required={"image1": ["IMAGE"], "image2": ["IMAGE"]}),
        outputs=("IMAGE",),
        display_name="Batch Images",
        category="image",
    ),
    NodeClass(
        "ImageToMask",
        image_to_mask,
        InputSpec(required={"image": ["IMAGE", {}], "channel": combo(CHANNELS)}),
        outputs=("MASK",),
        display_name="Convert Image to Mask",
        category="mask",
        python_module="comfy_extras.nodes_mask",
        extra_info=modern(1),
    ),
    NodeClass(
        "SaveImage",
        save_image,
        InputSpec(
            required={
                "images": ["IMAGE", {"tooltip": "The images to save."}],
                "filename_prefix": text("ComfyUI", tooltip=_PREFIX_TIP),
            },
            hidden=_HIDDEN,
        ),
        outputs=("IMAGE",),
        output_names=("images",),
        output_node=True,
        display_name="Save Image",
        category="image",
        description="Saves the input images to your ComfyUI output directory.",
        extra_info=aliases(
            "save",
            "save image",
            "export image",
            "output image",
            "write image",
            "download",
            essentials="Basics",
        ),
    ),
    NodeClass(
        "PreviewImage",
        preview_image,
        InputSpec(required={"images": ["IMAGE"]}, hidden=_HIDDEN),
        outputs=("IMAGE",),
        output_names=("images",),
        output_node=True,
        display_name="Preview Image",
        category="image",
        description="Saves the input images to your ComfyUI output directory.",
        extra_info=aliases("preview", "preview image", "show image", "view image", "display image", "image viewer"),
    ),
    NodeClass(
        "SaveImageAdvanced",
        save_image_advanced,
        InputSpec(
            required={
                "images": ["IMAGE", {}],
                "filename_prefix": text("ComfyUI", multiline=False),
                "format": ["COMFY_DYNAMICCOMBO_V3", {"options": [_PNG_FORMAT]}],
            },
            hidden=_HIDDEN_V3,
        ),
        output_node=True,
        display_name="Save Image (Advanced)",
        category="image",
        python_module="comfy_extras.nodes_images",
        extra_info=modern(0),
        since=(0, 28, 0),
    ),
    NodeClass(
        "SaveAnimatedWEBP",
        save_animated_webp,
        InputSpec(
            required={
                "images": ["IMAGE", {}],
                "filename_prefix": text("ComfyUI", multiline=False),
                "fps": real(6.0, 0.01, 1000.0, 0.01),
                "lossless": ["BOOLEAN", {"default": True}],
                "quality": whole(80, 0, 100),
                "method": combo(list(WEBP_METHODS)),
            },
            hidden=_HIDDEN_V3,
        ),
        output_node=True,
        display_name="Save Animated WEBP",
        category="image/animation",
        python_module="comfy_extras.nodes_images",
        extra_info=modern(0),
    ),
    NodeClass(
        "SaveAnimatedPNG",
        save_animated_png,
        InputSpec(
            required={
                "images": ["IMAGE", {}],
                "filename_prefix": text("ComfyUI", multiline=False),
                "fps": real(6.0, 0.01, 1000.0, 0.01),
                "compress_level": whole(4, 0, 9, advanced=True),
            },
            hidden=_HIDDEN_V3,
        ),
        output_node=True,
        display_name="Save Animated PNG",
        category="image/animation",
        python_module="comfy_extras.nodes_images",
        extra_info=modern(0),
    ),
    NodeClass(
        "MaskPreview",
        mask_preview,
        InputSpec(required={"mask": ["MASK", {}]}, hidden=_HIDDEN_V3),
        output_node=True,
        display_name="Preview Mask",
        category="mask",
        description="Saves the input images to your ComfyUI output directory.",
        python_module="comfy_extras.nodes_mask",
        extra_info=modern(0),
    ),
    NodeClass(
        "ImageCompare",
        image_compare,
        InputSpec(
            required={"compare_view": ["IMAGECOMPARE", {}]},
            optional={"image_a": ["IMAGE", {}], "image_b": ["IMAGE", {}]},
            hidden=_HIDDEN_V3,
        ),
        output_node=True,
        display_name="Image Compare",
        category="image",
        description="Compares two images side by side with a slider.",
        python_module="comfy_extras.nodes_image_compare",
        extra_info=modern(0),
        since=(0, 10, 0),
    ),
)
