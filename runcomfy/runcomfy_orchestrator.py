"""Public door: one job from request to files. It lives in `runcomfy.application.orchestrator`.

CONJURE's form of it, for its image and mesh in one run, lives in `runcomfy.conjure.orchestrator`.
"""

from runcomfy.conjure.orchestrator import FluxMeshJob, JobStatus, RunComfyOrchestrator

__all__ = ["FluxMeshJob", "JobStatus", "RunComfyOrchestrator"]
