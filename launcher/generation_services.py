"""Public door: the generation services by CONJURE's names. They live in `launcher.conjure.services`."""

from launcher.conjure.serverless import ServerlessGenerationService
from launcher.conjure.services import (
    CloudGenerationService,
    CloudGenerationService_Legacy,
    GenerationService,
    HuggingFaceGenerationService,
    LocalComfyUIService,
    LocalGenerationService,
    get_generation_service,
)

__all__ = [
    "CloudGenerationService",
    "CloudGenerationService_Legacy",
    "GenerationService",
    "HuggingFaceGenerationService",
    "LocalComfyUIService",
    "LocalGenerationService",
    "ServerlessGenerationService",
    "get_generation_service",
]
