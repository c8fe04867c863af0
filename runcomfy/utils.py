"""Public door: the few helpers worth sharing."""

from runcomfy.domain.durations import parse_duration, show_duration
from runcomfy.domain.exceptions import foreign_text
from runcomfy.domain.secret import Secret, SecretUrl

__all__ = ["Secret", "SecretUrl", "foreign_text", "parse_duration", "show_duration"]
