"""
Attributes of CONJURE's objects that its code writes to.

There, an attribute of a client is its setting: whoever writes another address, token or patience into it gets that from
the next call on. Here settings are values that do not change, so each call asks for them with what was written since.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from runcomfy.domain.exceptions import SettingInvalid, foreign_text
from runcomfy.domain.secret import Secret


def told_span(name: str, seconds: Any, known: timedelta, *, whole: bool = False) -> timedelta:
    """Return an attribute's seconds as a span: `known` itself where it says the same. Raises SettingInvalid.

    `whole`: the attribute shows whole seconds only, so the same whole seconds are not another value.
    """
    shown = int(known.total_seconds()) if whole else known.total_seconds()
    if seconds == shown:
        return known
    try:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
            raise ValueError
        return timedelta(seconds=seconds)
    except (ValueError, OverflowError) as error:  # nan and infinity, too
        raise SettingInvalid(
            f"{name} = {foreign_text(_shown(seconds), 60)} is no number of seconds",
            hint="give one from 0 on, such as 5",
        ) from error


def _shown(value: Any) -> Any:
    try:
        return str(value)
    except ValueError:  # Python writes no integers of thousands of digits
        return "a number of thousands of digits"


class TokenShown:
    """Of clients that show their account's token, and take another one."""

    _tokens: tuple[Secret, ...]

    @property
    def api_token(self) -> str:
        """The token in clear; empty if none is set."""
        return self._tokens[0].reveal() if self._tokens else ""

    @api_token.setter
    def api_token(self, token: str) -> None:
        self._tokens = (Secret(token),) if token else ()

    @property
    def headers(self) -> dict[str, str]:
        """What a request to the API carries."""
        return {"Authorization": f"Bearer {self.api_token}", "Content-Type": "application/json"}
