"""Public door: results in a server's history. It lives in `runcomfy.domain.workflow_io`."""

from runcomfy.domain.job import FileRef
from runcomfy.domain.workflow_io import (
    DeclaredOutput,
    FoundOutput,
    MatchedOutput,
    find_outputs,
    guess_kind,
    match_declared,
)

__all__ = [
    "DeclaredOutput",
    "FileRef",
    "FoundOutput",
    "MatchedOutput",
    "find_outputs",
    "guess_kind",
    "match_declared",
]
