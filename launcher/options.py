"""What `comfyctl serve` tells the HTTP part: whether it listens and where, and whom it tells that it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from runcomfy.application.service import ServeOptions
from runcomfy.domain.exceptions import ValueInvalid

HTTP: Final = "http"
"""The key of `ServeOptions.extra` that these options are under."""


@dataclass(frozen=True, slots=True)
class Listening:
    """Where the HTTP part listens."""

    host: str
    port: int
    address: str
    """`http://host:port`, as a browser on this computer reaches it."""
    page: str
    """The page's address with a code that logs in once, and is then worth nothing."""


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How HTTP is served by this process; what is None is as the settings say."""

    enabled: bool = False
    """A service that is not told to listens to nobody."""
    host: str | None = None
    port: int | None = None
    """0: any free one."""
    listening: Callable[[Listening], None] = lambda where: None
    """Called once, when requests are answered."""

    @classmethod
    def of(cls, options: ServeOptions) -> HttpOptions:
        """Return the options that a service was given. Raises ValueInvalid."""
        given = options.extra.get(HTTP)
        if given is None:
            return cls()
        if isinstance(given, HttpOptions):
            return given
        return cls._from(given)

    @classmethod
    def _from(cls, given: Mapping[str, Any]) -> HttpOptions:
        # The command line lives beside this package, not above it, and so says its options as plain values.
        try:
            return cls(**given)
        except TypeError as error:
            raise ValueInvalid(f"the options of the HTTP part are not understood: {error}") from error
