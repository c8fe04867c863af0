"""Public door: the machine pool. It lives in `runcomfy.application.machine_pool`."""

from runcomfy.application.machine_pool import MachinePool, PoolRow
from runcomfy.application.pooled import MachineLease, Pool, PooledMachine

__all__ = ["MachineLease", "MachinePool", "Pool", "PoolRow", "PooledMachine"]
