"""Public door: the values of the domain. They live in `runcomfy.domain`."""

from runcomfy.domain.job import BillLine, JobId, JobRequest, JobResult, JobStatus, Output, OutputKind, PromptId
from runcomfy.domain.lease import Owner, Use
from runcomfy.domain.machine import (
    Machine,
    MachineEvent,
    MachineId,
    MachineReport,
    MachineState,
    OwnerId,
    Purpose,
    ServerId,
)
from runcomfy.domain.money import LedgerEntry, Rate, RateTable
from runcomfy.domain.progress import Progress, Step

__all__ = [
    "BillLine",
    "JobId",
    "JobRequest",
    "JobResult",
    "JobStatus",
    "LedgerEntry",
    "Machine",
    "MachineEvent",
    "MachineId",
    "MachineReport",
    "MachineState",
    "Output",
    "OutputKind",
    "Owner",
    "OwnerId",
    "Progress",
    "PromptId",
    "Purpose",
    "Rate",
    "RateTable",
    "ServerId",
    "Step",
    "Use",
]
