"""Public door: the client of one ComfyUI server. It lives in `runcomfy.adapters.comfyui.client`.

The form that CONJURE makes, to which each call names the server, lives in `runcomfy.conjure.workflow_client`.
"""

from runcomfy.conjure.workflow_client import ComfyUIWorkflowClient, ExecutionStatus, GeneratedResult, PromptExecution

__all__ = ["ComfyUIWorkflowClient", "ExecutionStatus", "GeneratedResult", "PromptExecution"]
