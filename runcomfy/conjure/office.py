"""
How calls under CONJURE's names open the product.

CONJURE calls each method in whatever event loop it has just then, often a fresh one, so nothing that is bound to a loop
outlives a call: each opens the product, and what it rented stays in the books.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Self

from runcomfy.application.machines import Machines
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import LocalError, foreign_text
from runcomfy.domain.settings import Settings
from runcomfy.wiring.leaving import under_way

log = logging.getLogger("runcomfy.conjure")

Office = Callable[[Settings | None], App]
"""Returns the product, not entered yet; None: with settings read anew."""


def say(sentence: str) -> None:
    """Write a sentence meant for the user into the log: CONJURE has a console of its own."""
    log.warning(foreign_text(sentence, 600))


class _Office(App):
    """The product, which no program leaves behind that ends in the middle of a call."""

    _under_way: AbstractContextManager[None] | None = None

    async def __aenter__(self) -> Self:
        self._under_way = under_way()
        self._under_way.__enter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await super().__aexit__(*_)
        finally:
            if self._under_way is not None:
                self._under_way.__exit__(None, None, None)


def open_office(settings: Settings | None) -> App:
    """Return the product. What it rents is launched with the version id that the call gives. Raises SettingInvalid."""
    return _Office(settings, tell=say, launches=False)


async def cloud_to_stop(app: App) -> Machines:
    """Return the account's machines; without our books if those cannot be used, since stopping must still work."""
    try:
        machines, _ = await app.cloud()
    except LocalError as error:
        log.warning("books_unusable", extra={"fields": {"error": error.code}})
        machines, _ = await app.cloud(in_memory=True)
    return machines
