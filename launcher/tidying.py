"""
Keeps what HTTP leaves on the disk within bounds, while it is answered: uploads that no job uses, small pictures.

Results are not among it. They are what somebody paid for, and stay where they are until their owner removes them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from launcher.files import sweep_thumbnails
from launcher.intake import uploads_of
from runcomfy.application.job_queue import JobQueue
from runcomfy.bootstrap import App
from runcomfy.domain.exceptions import LocalError

log = logging.getLogger("runcomfy.http")

FIRST_AFTER_S: Final = 120.0
"""A service that is started is asked for other things first."""
SWEEP_EVERY_S: Final = 3600.0
JUMP_S: Final = 600.0
"""How much further than this process's own time the computer's clock goes only if it was set, or the computer slept."""


async def keep_tidy(app: App, queue: JobQueue, queue_name: str) -> None:
    """Sweep every hour, until cancelled. What cannot be swept now is swept later.

    The disk's times are the computer's clock: after that has jumped, what was sent just before has another hour.
    """
    loop = asyncio.get_running_loop()
    wait, ahead = FIRST_AFTER_S, time.time() - loop.time()
    while True:
        await asyncio.sleep(wait)
        wait = SWEEP_EVERY_S
        before, ahead = ahead, time.time() - loop.time()
        if ahead - before > JUMP_S:
            continue
        try:
            uploads = await uploads_of(app).sweep(queue.store.known_keys, queue=queue_name)
            pictures = await asyncio.to_thread(sweep_thumbnails, app.settings.files.state_dir)
        except LocalError as error:
            log.warning("not_swept", extra={"fields": {"error": error.code}})
            continue
        except Exception:
            log.exception("not_swept")  # a defect here may not end those that run jobs and stop machines
            continue
        if uploads or pictures:
            log.info("swept", extra={"fields": {"uploads": uploads, "thumbnails": pictures}})
