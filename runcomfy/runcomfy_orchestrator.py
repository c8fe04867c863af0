"""Public door: one job from request to files. It lives in `runcomfy.application.orchestrator`."""

from runcomfy.application.orchestrator import RunComfyOrchestrator

__all__ = ["RunComfyOrchestrator"]
