"""One public name, two classes: what is looked up or replaced on the name is what CONJURE's callers get."""

from __future__ import annotations

import inspect
from typing import Any
from unittest.mock import AsyncMock, create_autospec, patch

import pytest

from runcomfy.adapters.comfyui.client import ComfyUIWorkflowClient as ServerClient
from runcomfy.adapters.providers.runcomfy import RunComfyAPIClient as AccountClient
from runcomfy.application.orchestrator import RunComfyOrchestrator as JobRunner
from runcomfy.comfyui_workflow_client import ComfyUIWorkflowClient
from runcomfy.conjure.client import ConjureAPIClient
from runcomfy.runcomfy_client import RunComfyAPIClient
from runcomfy.runcomfy_orchestrator import RunComfyOrchestrator

NAMES: list[tuple[Any, dict[str, Any]]] = [
    (RunComfyAPIClient, {}),
    (ComfyUIWorkflowClient, {"output_dir": "data/generated_models"}),
    (RunComfyOrchestrator, {"workflow_path": "runcomfy/workflows/generate_flux_mesh.json"}),
]


@pytest.mark.parametrize(("name", "parameters"), NAMES)
def test_a_name_shows_how_conjure_makes_it(name: Any, parameters: dict[str, Any]) -> None:
    given = {
        parameter.name: parameter.default
        for parameter in inspect.signature(name).parameters.values()
        if parameter.kind is not parameter.KEYWORD_ONLY
    }
    assert given == parameters


def test_conjures_methods_are_found_on_the_names() -> None:
    launch: Any = RunComfyAPIClient.launch_machine
    assert list(inspect.signature(launch).parameters) == [
        "self",
        "server_type",
        "estimated_duration",
        "workflow_version_id",
    ]
    for name, methods in (
        (RunComfyAPIClient, ("wait_for_machine_ready", "get_or_create_ready_machine", "is_available")),
        (ComfyUIWorkflowClient, ("prepare_flux_mesh_workflow", "submit_workflow", "execute_workflow")),
        (RunComfyOrchestrator, ("load_workflow", "create_job", "execute_job", "estimate_cost", "get_cost_summary")),
    ):
        assert set(methods) <= set(dir(name))
        assert all(callable(getattr(name, method)) for method in methods)
    assert "create_job" in dir(create_autospec(RunComfyOrchestrator))


def test_what_stands_in_for_a_method_is_called_and_goes_again() -> None:
    before: Any = RunComfyAPIClient.launch_machine
    with patch.object(RunComfyAPIClient, "launch_machine", AsyncMock(return_value="there")) as stand_in:
        made: Any = RunComfyAPIClient()
        assert made.launch_machine is stand_in
    assert RunComfyAPIClient.launch_machine is before
    assert ConjureAPIClient.__dict__["launch_machine"] is before


def test_ours_stays_ours() -> None:
    for name, ours in (
        (RunComfyAPIClient, AccountClient),
        (ComfyUIWorkflowClient, ServerClient),
        (RunComfyOrchestrator, JobRunner),
    ):
        assert issubclass(name, ours)

    class Own(RunComfyOrchestrator):
        """A subclass is made with wiring, and is ours."""

        extra = 1

    assert "create_job" not in dir(Own)
    Own.extra = 2
    assert Own.extra == 2
    del Own.extra
    assert not hasattr(Own, "extra")
