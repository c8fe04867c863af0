"""Public door: how far workflows are, as CONJURE reads it. It lives in `runcomfy.conjure.progress_tracker`."""

from runcomfy.conjure.progress_tracker import (
    FluxMeshProgressTracker,
    NodeProgress,
    WorkflowProgress,
    WorkflowStage,
    progress_tracker,
)

__all__ = ["FluxMeshProgressTracker", "NodeProgress", "WorkflowProgress", "WorkflowStage", "progress_tracker"]
