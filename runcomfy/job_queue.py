"""Public door: the queue and its workers. They live in `runcomfy.application`."""

from runcomfy.application.job_queue import JobQueue, JobStory
from runcomfy.domain.queued import Attempt, EventKind, JobEvent, NewJob, Pause, QueuedJob, QueueStatus

__all__ = ["Attempt", "EventKind", "JobEvent", "JobQueue", "JobStory", "NewJob", "Pause", "QueueStatus", "QueuedJob"]
