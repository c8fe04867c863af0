"""How commands open the product: settings with their warnings, the log, and words for a hurried leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runcomfy.bootstrap import App
from runcomfy.cli.output import show_warnings, tell
from runcomfy.cli.runner import Interrupts
from runcomfy.cli.words import still_billing
from runcomfy.domain.settings import Settings


def load(
    overrides: Mapping[str, Any] | None = None,
    *,
    require_cloud: bool = False,
    launches: bool = True,
    quiet: bool = False,
    to_stop: bool = False,
) -> Settings:
    """Load the settings, start the log, show warnings; `to_stop`: see `load_settings`. Raises ConfigurationError."""
    from runcomfy.adapters.config import load_settings
    from runcomfy.adapters.log import configure_logging

    settings = load_settings(
        overrides=overrides, require_cloud=require_cloud, require_version=launches, to_stop=to_stop
    )
    configure_logging(settings)
    if not quiet:
        show_warnings(settings)
    return settings


def open_app(
    interrupts: Interrupts,
    overrides: Mapping[str, Any] | None = None,
    *,
    require_cloud: bool = False,
    launches: bool = True,
    quiet: bool = False,
    queue: Mapping[str, Any] | None = None,
    to_stop: bool = False,
) -> App:
    """Return the product, not yet entered, with its last words prepared. What never launches needs no version id.

    `queue`: the queue's settings that the command line gives, and `config`, the file with the others.
    `to_stop`: nothing is rented, and a wrong limit for renting does no harm.
    """
    settings = load(overrides, require_cloud=require_cloud, launches=launches, quiet=quiet, to_stop=to_stop)
    given = dict(queue or {})
    config = given.pop("config", None)
    app = App(settings, overrides=overrides, tell=tell, launches=launches, queue=given, queue_config=config)
    if queue is not None and not quiet:
        for warning in app.queue_settings.warnings:
            tell(f"warning: {warning}")
    interrupts.last_words = lambda: still_billing(app.held())
    return app
