"""
Errors that CONJURE's code catches by their built-in types.

CONJURE has no errors of its own: it catches `ValueError`, `FileNotFoundError`, `RuntimeError`, `TimeoutError`. What is
raised to it is the product's own error, with its code, hint and details, that is one of those, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from runcomfy.domain.exceptions import DeadlineExceeded, InputFileMissing, RunComfyError, WorkflowNotFound

_TWINS: Final[dict[tuple[type[RunComfyError], type[Exception]], Any]] = {}
"""Our error and a built-in one -> the class that is both; made when first raised."""


def _twin(kind: type[RunComfyError], builtin: type[Exception]) -> Any:
    if (kind, builtin) not in _TWINS:
        parts = {"__doc__": kind.__doc__, "__module__": __name__}
        _TWINS[kind, builtin] = type(kind.__name__, (kind, builtin), parts)
    return _TWINS[kind, builtin]


def also(error: RunComfyError, builtin: type[Exception]) -> RunComfyError:
    """Return the same error as one that is a `builtin`, too."""
    if isinstance(error, builtin):
        return error
    twin: RunComfyError = _twin(type(error), builtin)(error.message, hint=error.hint, details=error.details)
    twin.__cause__ = error
    return twin


@contextmanager
def builtin_errors(otherwise: type[Exception] = RuntimeError) -> Iterator[None]:
    """Raise our errors as the built-in type that fits: a missing file, a limit of time, else `otherwise`."""
    try:
        yield
    except (WorkflowNotFound, InputFileMissing) as error:
        raise also(error, FileNotFoundError) from error
    except DeadlineExceeded as error:
        raise also(error, TimeoutError) from error
    except RunComfyError as error:
        raise also(error, otherwise) from error
