"""
Keeps what HTTP leaves on the disk within bounds, while it is answered: uploads that no job uses, small pictures.

Results are not among it. They are what somebody paid for, and stay where they are until their owner removes them.
"""

from __future__ import annotations

import asyncio
import logging
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


async def keep_tidy(app: App, queue: JobQueue, queue_name: str) -> None:
    """Sweep every hour, until cancelled. What cannot be swept now is swept later."""
    wait = FIRST_AFTER_S
    while True:
        await asyncio.sleep(wait)
        wait = SWEEP_EVERY_S
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
