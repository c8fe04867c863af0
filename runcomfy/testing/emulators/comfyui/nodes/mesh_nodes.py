"""Nodes of the core that turn voxels into meshes, tell about meshes, and save or show them."""

from __future__ import annotations

from typing import Any

from runcomfy.testing.emulators.comfyui.nodes import meshes
from runcomfy.testing.emulators.comfyui.nodes.base import InputSpec, NodeClass, NodeContext, NodeResult
from runcomfy.testing.emulators.comfyui.nodes.declare import combo, modern, real, text, whole
from runcomfy.testing.emulators.comfyui.nodes.values import (
    EMULATION_NOTE,
    File3D,
    Voxels,
    graph_metadata,
    stable_random,
    write_files,
)

FILE_3D = (
    "FILE_3D_GLB,FILE_3D_GLTF,FILE_3D_OBJ,FILE_3D_FBX,FILE_3D_STL,FILE_3D_USDZ,FILE_3D_PLY,FILE_3D_SPLAT,FILE_3D_SPZ,"
    "FILE_3D_KSPLAT,FILE_3D_SPLAT_ANY,FILE_3D_POINT_CLOUD_ANY,FILE_3D"
)
_HIDDEN = {"prompt": ["PROMPT"], "extra_pnginfo": ["EXTRA_PNGINFO"]}


def file_bytes(value: meshes.Mesh | File3D, context: NodeContext) -> tuple[bytes, str]:
    """Return a model's bytes and the extension of its file; a mesh becomes GLB, with the graph in its extras."""
    if isinstance(value, File3D):
        return value.data, value.extension
    return meshes.glb(value, extras={**graph_metadata(context), "emulator": EMULATION_NOTE}), "glb"


async def voxel_to_mesh(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """The surface of the solid cells."""
    voxels: Voxels = inputs["voxel"]
    mesh = await context.in_thread(meshes.voxel_ball, voxels.resolution, inputs["threshold"])
    # In hundredths, as fast as it goes: what a server's throttle is there for.
    for step in range(100):
        await context.progress(step + 1, 100)
    return NodeResult([mesh])


async def save_glb(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A mesh or a ready file, under the key `3d`."""

    def save() -> list[dict[str, str]]:
        target = context.save_path(inputs["filename_prefix"])
        data, extension = file_bytes(inputs["mesh"], context)
        return write_files(target, [(target.name(f".{extension}"), data)], "output")

    return NodeResult([], ui={"3d": await context.in_thread(save)})


async def mesh_to_file(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A GLB file in memory."""
    mesh: meshes.Mesh = inputs["mesh"]
    note = {"emulator": EMULATION_NOTE}
    return NodeResult([File3D(await context.in_thread(lambda: meshes.glb(mesh, extras=note)))])


async def preview_3d(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A copy in the output folder, told as a bare path; a path that is given is told as it is.

    The background, if there is one, is told as a path too, below the server's folder.
    """
    model: File3D | str = inputs["model_file"]
    letters = stable_random(context.prompt_id, context.node_id)
    background: str | None = None
    if isinstance(model, str):
        name = model.replace("\\", "/")
    else:
        name = f"preview3d_{letters.getrandbits(128):032x}.{model.extension}"
        await context.in_thread((context.folders.output / name).write_bytes, model.data)
    if inputs.get("bg_image") is not None:
        file = f"bg_{letters.getrandbits(128):032x}.png"
        await context.in_thread(inputs["bg_image"].frames[0].save, context.folders.temp / file)
        background = f"temp/{file}"
    return NodeResult([], ui={"result": [name, inputs.get("camera_info"), background]})


async def save_3d_advanced(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """A file told as a path below the output folder, with the camera and the list of models."""

    def save() -> str:
        target = context.save_path(inputs["filename_prefix"])
        data, extension = file_bytes(inputs["model_3d"], context)
        name = target.name(f".{extension}", underscore=False)
        write_files(target, [(name, data)], "output")
        return f"{target.subfolder}/{name}" if target.subfolder else name

    state = inputs["viewport_state"] if isinstance(inputs["viewport_state"], dict) else {}
    camera = inputs.get("camera_info") or state.get("camera_info")
    placed = inputs.get("model_3d_info") or state.get("model_3d_info", [])
    outputs = [inputs["model_3d"], placed, camera, inputs["width"], inputs["height"]]
    return NodeResult(outputs, ui={"result": [await context.in_thread(save), camera, placed]})


def count_text(count: int) -> str:
    """Return a count as the real node shows it: `2,354`, `12,345 (12.3K)`, `1,234,567 (1.23M)`."""
    if count >= 1_000_000:
        return f"{count:,} ({count / 1_000_000:.2f}M)"
    return f"{count:,} ({count / 1_000:.1f}K)" if count >= 10_000 else f"{count:,}"


async def mesh_info(context: NodeContext, inputs: dict[str, Any]) -> NodeResult:
    """Counts, as text; also sent as a text frame."""
    mesh: meshes.Mesh = inputs["mesh"]
    have = [name for name, values in (("vertex_colors", mesh.colors), ("normals", mesh.normals)) if values]
    info = (
        f"Vertices:   {count_text(mesh.vertices)}\nFaces:      {count_text(mesh.faces)}\n"
        f"Attributes: {', '.join(have) or 'none'}"
    )
    await context.send_text(info)
    return NodeResult([mesh, info], ui={"text": [info]})


CLASSES = (
    NodeClass(
        "VoxelToMesh",
        voxel_to_mesh,
        InputSpec(
            required={
                "voxel": ["VOXEL", {}],
                "algorithm": combo(["surface net", "basic"], advanced=True),
                "threshold": real(0.6, -1.0, 1.0, 0.01),
            }
        ),
        outputs=("MESH",),
        display_name="Voxel to Mesh",
        category="3d",
        python_module="comfy_extras.nodes_hunyuan3d",
        extra_info=modern(1),
    ),
    NodeClass(
        "SaveGLB",
        save_glb,
        InputSpec(
            required={
                "mesh": [f"MESH,{FILE_3D}", {"tooltip": "Mesh or 3D file to save"}],
                "filename_prefix": text("3d/ComfyUI", multiline=False),
            },
            hidden=_HIDDEN,
        ),
        output_node=True,
        display_name="Save 3D Model",
        category="3d",
        python_module="comfy_extras.nodes_save_3d",
        extra_info=modern(0, aliases=("export 3d model", "save mesh"), essentials="Basics"),
        since=(0, 3, 27),
    ),
    NodeClass(
        "MeshToFile3D",
        mesh_to_file,
        InputSpec(required={"mesh": ["MESH", {}]}),
        outputs=("FILE_3D_GLB",),
        output_names=("model_3d",),
        display_name="Create 3D File (from Mesh)",
        category="3d",
        python_module="comfy_extras.nodes_save_3d",
        extra_info=modern(1),
        since=(0, 20, 0),
    ),
    NodeClass(
        "Preview3D",
        preview_3d,
        InputSpec(
            required={"model_file": [f"STRING,{FILE_3D}", {"tooltip": "3D model file or path string"}]},
            optional={"camera_info": ["LOAD3D_CAMERA", {}], "bg_image": ["IMAGE", {}]},
        ),
        output_node=True,
        display_name="Preview 3D & Animation",
        category="3d",
        python_module="comfy_extras.nodes_load_3d",
        extra_info={**modern(0), "experimental": True},
        since=(0, 3, 30),
    ),
    NodeClass(
        "Save3DAdvanced",
        save_3d_advanced,
        InputSpec(
            required={
                "model_3d": [f"MESH,{FILE_3D}", {}],
                "filename_prefix": text("3d/ComfyUI", multiline=False),
                "viewport_state": ["LOAD_3D", {}],
                "width": whole(1024, 1, 4096, 1),
                "height": whole(1024, 1, 4096, 1),
            },
            optional={
                "model_3d_info": ["LOAD3D_MODEL_INFO", {"advanced": True}],
                "camera_info": ["LOAD3D_CAMERA", {"advanced": True}],
            },
        ),
        outputs=("FILE_3D", "LOAD3D_MODEL_INFO", "LOAD3D_CAMERA", "INT", "INT"),
        output_names=("model_3d", "model_3d_info", "camera_info", "width", "height"),
        output_node=True,
        display_name="Save 3D (Advanced)",
        category="3d",
        python_module="comfy_extras.nodes_save_3d",
        extra_info={**modern(5), "experimental": True},
        since=(0, 28, 0),
    ),
    NodeClass(
        "GetMeshInfo",
        mesh_info,
        InputSpec(required={"mesh": ["MESH", {}]}),
        outputs=("MESH", "STRING"),
        output_names=("mesh", "info"),
        # Shows something without being an output: it only runs for the sake of others.
        display_name="Get Mesh Info",
        category="3d/mesh",
        python_module="comfy_extras.nodes_save_3d",
        extra_info={**modern(2), "has_intermediate_output": True},
        since=(0, 20, 0),
    ),
)
