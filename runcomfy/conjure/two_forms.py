"""
One public name for two classes.

`RunComfyAPIClient`, `ComfyUIWorkflowClient` and `RunComfyOrchestrator` are names of CONJURE's, made there with no or
one argument, and names of ours, made with their wiring. The arguments say which of the two is meant. What is looked up
on the name itself (a method's signature, a method that a test puts a stand-in for) is CONJURE's where it has one:
those who use ours so have its class, which the docstring of its public door names.
"""

from __future__ import annotations

import inspect
from typing import Any


class TwoForms(type):
    """The type of a public name; `isinstance` is true for objects of either form."""

    conjure_form: type

    def __instancecheck__(cls, instance: Any) -> bool:
        """Say whether `instance` is one of ours or one of CONJURE's form."""
        return super().__instancecheck__(instance) or isinstance(instance, cls.__dict__.get("conjure_form", ()))

    def __getattribute__(cls, name: str) -> Any:
        """Return CONJURE's attribute of that name if it has one, else ours."""
        if not name.startswith("_"):
            form = type.__getattribute__(cls, "__dict__").get("conjure_form")
            if form is not None and name in form.__dict__:
                return getattr(form, name)
        return super().__getattribute__(name)

    def __dir__(cls) -> list[str]:
        """Name what either has."""
        return sorted({*super().__dir__(), *dir(cls.__dict__.get("conjure_form", object))})

    def __setattr__(cls, name: str, value: Any) -> None:
        """Put something in the place of CONJURE's attribute, as tests do, or set one of ours."""
        form = cls.__dict__.get("conjure_form")
        if form is None or name not in form.__dict__:
            super().__setattr__(name, value)
            return
        cls._replaced().setdefault(name, form.__dict__[name])
        setattr(form, name, value)

    def __delattr__(cls, name: str) -> None:
        """Put back what `__setattr__` replaced, or delete one of ours."""
        replaced = cls._replaced()
        if name in replaced:
            setattr(cls.__dict__["conjure_form"], name, replaced.pop(name))
            return
        super().__delattr__(name)

    def _replaced(cls) -> dict[str, Any]:
        found: dict[str, Any] | None = cls.__dict__.get("_two_forms_replaced")
        if found is None:
            found = {}
            super().__setattr__("_two_forms_replaced", found)
        return found

    @property
    def __signature__(cls) -> inspect.Signature | None:
        """How CONJURE's form is made; None for a subclass, which is ours and is asked in the usual way."""
        form = cls.__dict__.get("conjure_form")
        return None if form is None else inspect.signature(form)
