"""The emulated RunComfy cloud; `RunComfyEmulator` is where to begin."""

from runcomfy.testing.emulators.runcomfy.cloud import CallRecord
from runcomfy.testing.emulators.runcomfy.faults import CallFault
from runcomfy.testing.emulators.runcomfy.machines import DEFAULT_RATES, LEFT_OUT, Bill, EmulatedMachine, Stage, Traits
from runcomfy.testing.emulators.runcomfy.server import RunComfyEmulator

__all__ = [
    "DEFAULT_RATES",
    "LEFT_OUT",
    "Bill",
    "CallFault",
    "CallRecord",
    "EmulatedMachine",
    "RunComfyEmulator",
    "Stage",
    "Traits",
]
