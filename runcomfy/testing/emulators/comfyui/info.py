"""Routes that tell about the server: stats, features, node classes, models."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil
from aiohttp import web

from runcomfy.testing.emulators.comfyui.keys import process_of
from runcomfy.testing.emulators.comfyui.nodes.base import Folders, NodeClass
from runcomfy.testing.emulators.comfyui.process import ServerProcess

routes = web.RouteTableDef()

MODEL_FOLDERS = (
    "checkpoints",
    "configs",
    "loras",
    "vae",
    "text_encoders",
    "diffusion_models",
    "clip_vision",
    "style_models",
    "embeddings",
    "diffusers",
    "vae_approx",
    "controlnet",
    "gligen",
    "upscale_models",
    "latent_upscale_models",
    "custom_nodes",
    "datasets",
    "hypernetworks",
    "photomaker",
    "classifiers",
    "model_patches",
    "audio_encoders",
    "background_removal",
    "frame_interpolation",
    "geometry_estimation",
    "optical_flow",
    "detection",
)

MODEL_SUFFIXES = {".ckpt", ".pt", ".pt2", ".bin", ".pth", ".safetensors", ".pkl", ".sft", ".onnx"}


@routes.get("/system_stats")
async def system_stats(request: web.Request) -> web.Response:
    """Versions, memory, devices, the command line; `--emulated` in it says what this is."""
    process = process_of(request)
    can = process.capabilities
    memory = psutil.virtual_memory()
    modern = can.jobs_count_3d
    system: dict[str, Any] = {
        "os": platform.system().lower() if can.jobs else "posix",
        "ram_total": memory.total,
        "ram_free": memory.available,
        "comfyui_version": can.text,
        "required_frontend_version": "1.49.6",
        "installed_templates_version": "0.11.44",
        "required_templates_version": "0.11.44",
    }
    if modern:
        system["comfy_package_versions"] = [
            {"name": "comfyui-frontend-package", "installed": "1.49.6", "required": "1.49.6"},
            {"name": "comfyui-workflow-templates", "installed": "0.11.44", "required": "0.11.44"},
        ]
        system["deploy_environment"] = "emulated"
    system["python_version"] = platform.python_version()
    system["pytorch_version"] = "0.0.0+emulated"
    system["embedded_python"] = False
    system["argv"] = ["main.py", "--emulated", *_arguments(process)]
    device: dict[str, Any] = {"name": "cpu", "type": "cpu", "index": None}
    for key in ("vram_total", "vram_free", "torch_vram_total", "torch_vram_free"):
        device[key] = memory.total if key.endswith("total") else memory.available
    return web.json_response({"system": system, "devices": [device]})


def _arguments(process: ServerProcess) -> list[str]:
    options = process.options
    arguments = ["--cpu", "--base-directory", str(process.folders.output.parent)]
    if options.multi_user:
        arguments.append("--multi-user")
    if not options.cache:
        arguments.append("--cache-none")
    if options.enable_assets:
        arguments.append("--enable-assets")
    if options.cors is not None:
        arguments += ["--enable-cors-header", options.cors]
    return arguments


@routes.get("/features")
async def features(request: web.Request) -> web.Response:
    """Feature flags."""
    process = process_of(request)
    if not process.capabilities.modern_progress:
        return web.Response(status=404, content_type="application/octet-stream")
    return web.json_response(process.features())


def node_info(node: NodeClass, process: ServerProcess) -> dict[str, Any]:
    """A class's entry in `/object_info`."""
    spec = node.spec(process.folders)
    modern = process.capabilities.jobs_count_3d
    groups = {"required": spec.required, "optional": spec.optional, "hidden": spec.hidden}
    inputs = {
        category: {name: list(config) if category != "hidden" else config for name, config in group.items()}
        for category, group in groups.items()
        if group or category == "required"
    }
    info: dict[str, Any] = {
        "input": inputs,
        "input_order": {category: list(group) for category, group in inputs.items()},
        "output": list(node.outputs),
        "output_is_list": list(node.output_is_list or (False for _ in node.outputs)),
        "output_name": list(node.output_names or node.outputs),
        "name": node.name,
        "display_name": node.display_name or node.name,
        "description": node.description,
        "python_module": node.python_module,
        "category": node.category,
        "output_node": node.output_node,
    }
    if modern:
        info |= {"is_input_list": node.input_is_list, "has_intermediate_output": False}
    if process.capabilities.search_aliases:
        info["search_aliases"] = []
    for flag in ("deprecated", "experimental", "api_node"):
        if getattr(node, flag):
            info[flag] = True
    return info | dict(node.extra_info)


@routes.get("/object_info")
async def object_info(request: web.Request) -> web.Response:
    """Every class."""
    process = process_of(request)
    return web.json_response({name: node_info(node, process) for name, node in process.nodes.items()})


@routes.get("/object_info/{name}")
async def object_info_of(request: web.Request) -> web.Response:
    """One class, or nothing."""
    process = process_of(request)
    node = process.nodes.get(request.match_info["name"])
    return web.json_response({} if node is None else {node.name: node_info(node, process)})


def _models(folders: Folders, kind: str) -> list[Path]:
    root = folders.models / kind
    return sorted(path for path in root.rglob("*") if path.is_file() and path.suffix.lower() in MODEL_SUFFIXES)


@routes.get("/embeddings")
async def embeddings(request: web.Request) -> web.Response:
    """Names of embeddings."""
    found = _models(process_of(request).folders, "embeddings")
    return web.json_response([path.stem for path in found])


@routes.get("/models")
async def model_kinds(request: web.Request) -> web.Response:
    """Kinds of models."""
    return web.json_response(list(MODEL_FOLDERS))


@routes.get("/models/{kind}")
async def models(request: web.Request) -> web.Response:
    """Names of models of a kind."""
    kind = request.match_info["kind"]
    folders = process_of(request).folders
    if kind not in MODEL_FOLDERS:
        return web.Response(status=404)
    root = folders.models / kind
    return web.json_response([path.relative_to(root).as_posix() for path in _models(folders, kind)])


@routes.get("/experiment/models")
async def model_folders(request: web.Request) -> web.Response:
    """Kinds of models with their folders."""
    root = process_of(request).folders.models
    return web.json_response([{"name": kind, "folders": [str(root / kind)]} for kind in MODEL_FOLDERS])


@routes.get("/experiment/models/{kind}")
async def model_details(request: web.Request) -> web.Response:
    """Models of a kind with their details."""
    kind = request.match_info["kind"]
    folders = process_of(request).folders
    if kind not in MODEL_FOLDERS:
        return web.Response(status=404)
    root = folders.models / kind
    found = [
        {
            "name": path.relative_to(root).as_posix(),
            "pathIndex": 0,
            "modified": path.stat().st_mtime,
            "created": path.stat().st_ctime,
            "size": path.stat().st_size,
        }
        for path in _models(folders, kind)
    ]
    return web.json_response(found)


@routes.get("/view_metadata/{kind}")
async def view_metadata(request: web.Request) -> web.Response:
    """The header metadata of a model file; the emulator has none that carries any."""
    return web.Response(status=404)


@routes.get("/extensions")
async def extensions(request: web.Request) -> web.Response:
    """Scripts of the web page, which this server does not have."""
    return web.json_response([])


@routes.get("/i18n")
@routes.get("/workflow_templates")
@routes.get("/global_subgraphs")
@routes.get("/node_replacements")
async def for_the_web_page(request: web.Request) -> web.Response:
    """Only the web page asks for these."""
    return web.json_response({})


ASSETS_OFF = {
    "error": {
        "code": "SERVICE_DISABLED",
        "message": "Assets system is disabled. Start the server with --enable-assets to use this feature.",
        "details": {},
    }
}


@routes.get("/api/assets")
@routes.get("/api/tags")
async def assets(request: web.Request) -> web.Response:
    """Assets are switched off, or empty."""
    process = process_of(request)
    if not process.capabilities.assets:
        return web.Response(status=404, content_type="application/octet-stream")
    if not process.options.enable_assets:
        return web.json_response(ASSETS_OFF, status=503)
    return web.json_response({"assets": [], "total": 0, "has_more": False})


@routes.get("/internal/folder_paths")
async def folder_paths(request: web.Request) -> web.Response:
    """Folders by kind; for the web page, and explicitly not stable."""
    root = process_of(request).folders.models
    return web.json_response({kind: [str(root / kind)] for kind in MODEL_FOLDERS})


@routes.get("/internal/files/{kind}")
async def folder_files(request: web.Request) -> web.Response:
    """Files of a folder, newest first."""
    kind = request.match_info["kind"]
    root = process_of(request).folders.of(kind)
    if root is None:
        return web.json_response({"error": "Invalid directory type"}, status=400)
    files = sorted((p for p in root.iterdir() if p.is_file()), key=lambda p: -p.stat().st_mtime)
    return web.json_response([f"{path.name} [{kind}]" for path in files])
