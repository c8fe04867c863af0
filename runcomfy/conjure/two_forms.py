"""
One public name for two classes.

`RunComfyAPIClient`, `ComfyUIWorkflowClient` and `RunComfyOrchestrator` are names of CONJURE's, made there with no or
one argument, and names of ours, made with their wiring. The arguments say which of the two is meant.
"""

from __future__ import annotations

from typing import Any


class TwoForms(type):
    """The type of a public name; `isinstance` is true for objects of either form."""

    conjure_form: type

    def __instancecheck__(cls, instance: Any) -> bool:
        """Say whether `instance` is one of ours or one of CONJURE's form."""
        return super().__instancecheck__(instance) or isinstance(instance, cls.__dict__.get("conjure_form", ()))
