"""Every node class of the emulated ComfyUI, by name."""

from collections.abc import Mapping

from runcomfy.testing.emulators.comfyui.nodes import (
    flux_mesh,
    images,
    media_nodes,
    mesh_nodes,
    probes,
    sampling,
    text,
    utility,
)
from runcomfy.testing.emulators.comfyui.nodes.base import NodeClass

NODE_CLASSES: Mapping[str, NodeClass] = {
    node.name: node
    for module in (images, sampling, text, media_nodes, mesh_nodes, flux_mesh, probes, utility)
    for node in module.CLASSES
}
"""What a `ComfyUIEmulator` knows unless it is given other classes."""
