"""
A pool whose machines stand there for good: ComfyUI servers at given addresses, rented from nobody.

For tests and measurements of what works over a pool (`runcomfy.application.pooled.Pool`) without launching anything. A
machine can be lost, flap, drain or be added, as the test says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from uuid import uuid4

from runcomfy.application.pooled import MachineLease, PooledMachine
from runcomfy.domain.exceptions import MachineLost, NoCapacity, RunComfyError
from runcomfy.domain.job import JobId
from runcomfy.domain.machine import Machine, MachineId, MachineState, Purpose, ServerId
from runcomfy.domain.plan_view import Stage
from runcomfy.ports.clock import Clock
from runcomfy.ports.comfyui import ComfyUI


class StandingPool:
    """Keeps `Pool`. Machines are Ready as soon as they are added, unless `boots` says otherwise."""

    def __init__(self, clock: Clock, *, depth: int = 2, usd_per_hour: Decimal = Decimal("1.75")) -> None:
        """Nothing is in it yet."""
        self._clock, self._depth, self._price = clock, depth, usd_per_hour
        self._machines: list[PooledMachine] = []
        self._listeners: list[Callable[[], None]] = []
        self._pending = False
        self.ended: list[tuple[MachineLease, str, RunComfyError | None]] = []
        """Every lease that was given back: outcome and error."""

    # -- what the test does --------------------------------------------------------------------------------

    def add(self, server: ComfyUI, *, server_type: str = "medium", boots: float = 0.0) -> PooledMachine:
        """Put a machine in; one that boots gets Ready after so many seconds."""
        now, at = asyncio.get_running_loop().time(), self._clock.now()
        number = len(self._machines) + 1
        row = Machine(
            id=MachineId(str(uuid4())),
            provider="standing",
            account="test",
            purpose=Purpose.POOL,
            server_type=server_type,
            duration=timedelta(hours=1),
            usd_per_hour=self._price,
            rate_source="test",
            requested_at=at,
            since=at,
            state=MachineState.READY,
            server_id=ServerId(f"standing-{number}"),
            ready_at=at,
        )
        machine = PooledMachine(row, launched_at=now, expected_ready_at=now + boots)
        self._machines.append(machine)
        if boots > 0:
            asyncio.get_running_loop().call_later(boots, self.ready, machine, server)
        else:
            self.ready(machine, server)
        return machine

    def ready(self, machine: PooledMachine, server: ComfyUI) -> None:
        """Let a machine be usable (again): its leases from before are void."""
        machine.server, machine.stage = server, Stage.READY
        machine.epoch += 1
        machine.warm.clear()
        machine.expected_ready_at = asyncio.get_running_loop().time()
        self._changed()

    def lose(self, machine: PooledMachine) -> None:
        """Let a machine be gone."""
        self._machines.remove(machine)
        machine.gone = True
        machine.changes += 1
        self._changed()

    # -- the pool ------------------------------------------------------------------------------------------

    @property
    def machines(self) -> tuple[PooledMachine, ...]:
        """See `Pool`."""
        return tuple(self._machines)

    def on_change(self, listener: Callable[[], None]) -> None:
        """See `Pool`."""
        self._listeners.append(listener)

    def _changed(self) -> None:
        for machine in self._machines:
            machine.changes += 1
        if not self._pending:
            self._pending = True
            asyncio.get_running_loop().call_soon(self._tell)

    def _tell(self) -> None:
        self._pending = False
        for listener in self._listeners:
            listener()

    def lease(
        self,
        pooled: PooledMachine,
        *,
        job_id: JobId,
        attempt: int,
        workflow: str,
        user: str = "",
        project: str = "",
        expected_s: float = 0.0,
        attach: bool = False,
    ) -> MachineLease:
        """See `Pool`."""
        full = not pooled.takes_jobs or pooled.seated >= self._depth
        if pooled not in self._machines or pooled.server is None or (full and not attach):
            raise MachineLost("the machine takes no jobs, or has no seat free")
        lease = MachineLease(
            pooled,
            job_id,
            attempt,
            workflow,
            user,
            project,
            token=pooled.epoch,
            began_at=self._clock.now(),
            expected_s=expected_s,
            cold=workflow not in pooled.warm,
        )
        pooled.leases.append(lease)
        self._changed()
        return lease

    def computing(self, lease: MachineLease, *, ago_s: float = 0.0) -> None:
        """See `Pool`."""
        lease.computing_at = asyncio.get_running_loop().time() - ago_s
        lease.cold = lease.workflow not in lease.machine.warm
        self._changed()

    def computed(self, lease: MachineLease) -> None:
        """See `Pool`."""
        lease.computed_at = asyncio.get_running_loop().time()
        if lease.computing_at is not None and not lease.void:
            lease.machine.warm.add(lease.workflow)
        self._changed()

    def give_back(self, lease: MachineLease, *, outcome: str, error: RunComfyError | None = None) -> None:
        """See `Pool`."""
        if lease.given_back:
            return
        lease.given_back = True
        lease.machine.leases.remove(lease)
        self.ended.append((lease, outcome, error))
        if lease.machine.draining and not lease.machine.leases and lease.machine in self._machines:
            self._machines.remove(lease.machine)
        self._changed()

    def cost_share(self, lease: MachineLease) -> Decimal:
        """See `Pool`: here every job pays its whole time."""
        spent = Decimal(str((self._clock.now() - lease.began_at).total_seconds()))
        return (spent * self._price / 3600).quantize(Decimal("0.000001"))

    async def launch(
        self, server_type: str, *, why: str, hold_s: float = 0.0, for_user: str = "", for_project: str = ""
    ) -> MachineId:
        """See `Pool`: there is nobody to rent from."""
        raise NoCapacity("machines of this pool are put in by hand")

    def want(self, machine_id: MachineId, *, until: float) -> None:
        """See `Pool`."""
        self._of(machine_id).wanted_until = until

    def drain(self, machine_id: MachineId, *, why: str) -> None:
        """See `Pool`."""
        machine = self._of(machine_id)
        machine.draining, machine.stage = why, Stage.DRAINING
        if not machine.leases:
            self._machines.remove(machine)
        self._changed()

    def room(self, server_type: str) -> int:
        """See `Pool`."""
        return 0

    def why_no_room(self, server_type: str) -> str:
        """See `Pool`."""
        return "machines of this pool are put in by hand"

    def pausing(self, server_type: str) -> bool:
        """See `Pool`."""
        return False

    def _of(self, machine_id: MachineId) -> PooledMachine:
        return next(machine for machine in self._machines if machine.id == machine_id)
