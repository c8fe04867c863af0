"""Public door: the client of RunComfy's Server API. It lives in `runcomfy.adapters.providers.runcomfy`.

The form that CONJURE makes without arguments, and what it returns, live in `runcomfy.conjure.client`.
"""

from runcomfy.conjure.client import MachineInfo, MachineStatus, RunComfyAPIClient, ServerType, WorkflowInfo

__all__ = ["MachineInfo", "MachineStatus", "RunComfyAPIClient", "ServerType", "WorkflowInfo"]
