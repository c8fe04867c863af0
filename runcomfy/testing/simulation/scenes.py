"""Short days that are told what is to happen: each shows one switch (`switches.py`) soon, and is green without it."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from runcomfy.domain.budget import Budget, Period
from runcomfy.domain.exceptions import DiskFull
from runcomfy.testing.emulators.comfyui.faults import Fault, SocketFault
from runcomfy.testing.simulation.direction import Direction, Happening
from runcomfy.testing.simulation.faults_comfyui import flip
from runcomfy.testing.simulation.faults_programs import READS
from runcomfy.testing.simulation.harm import harm_of
from runcomfy.testing.simulation.load import KINDS, Order

if TYPE_CHECKING:
    from runcomfy.testing.simulation.world import World

KIND: Final = {kind.name: kind for kind in KINDS}


def _order(number: int, at: float, *, kind: str = "picture", seconds: float = 60.0, **given: Any) -> Order:
    return Order(number, KIND[kind], at, seconds, "ann", 50, given.pop("retry_limit", 2), **given)


def _few() -> list[Order]:
    return [_order(number, 60.0 + 20 * number) for number in range(1, 5)]


def _long() -> list[Order]:
    return [_order(number, 60.0 + 5 * number, seconds=400.0) for number in range(1, 7)]


# -- what happens ----------------------------------------------------------------------------------------------


def _call(call: str, **fault: Any) -> Happening:
    async def happen(world: World) -> None:
        world.cloud.next_call(call, **fault)
        harm_of(world).note(0, f"{call} will have {fault}")

    return happen


async def _deaf(world: World) -> None:
    """The machines there are ignore stops, and their time, for an hour."""
    harm = harm_of(world)
    for machine in harm.machines():
        machine.traits.ignores_delete = machine.traits.ignores_stop_time = True
        harm.note(19, "ignores stops", lasts=3_600, machine=machine.server_id)

        def hears(machine: Any = machine) -> None:
            machine.traits.ignores_delete = machine.traits.ignores_stop_time = False
            world.cloud.plan_end_again(machine)

        harm.later(3_600, hears)


async def _stranger(world: World) -> None:
    machine = world.cloud.foreign("large", duration=3_600)
    harm_of(world).note(12, "somebody else's machine appears", machine=machine.server_id)


def _comfyui(method: str, path: str, fault: Fault, *, times: int = 1) -> Happening:
    async def happen(world: World) -> None:
        for machine, comfyui in harm_of(world).comfyuis():
            comfyui.faults.add(method, path, fault, times=times)
            harm_of(world).note(0, f"{method} {path} will go wrong", machine=machine.server_id)

    return happen


async def _silent(world: World) -> None:
    """Sockets say two things and then nothing any more, for good."""
    harm = harm_of(world)
    for machine, comfyui in harm.comfyuis():
        comfyui.faults.add_socket(SocketFault(silent_after=2), times=1_000)
        comfyui.cut_sockets()
        harm.note(45, "sockets fall silent", machine=machine.server_id, lasts=7_200)


async def _second(world: World) -> None:
    await world.start_service()
    harm_of(world).note(63, "a second service")


async def _killed(world: World) -> None:
    harm_of(world).note(61, "the service is killed", lasts=5)
    await world.kill_and_restart(world.served[0], timedelta(seconds=5))


async def _full(world: World) -> None:
    """For an hour nothing can be written by the service."""
    until = world.seconds + 3_600

    def visit(place: str) -> None:
        when, _, call = place.partition(" ")
        port, _, name = call.partition(".")
        full = when == "before" and port == "store" and name not in READS and name != "changed"
        if full and world.seconds < until and name in ("add_machine", "record", "change"):
            raise DiskFull("no space left on device")

    world.served[0].app.visit = visit
    harm_of(world).note(54, "the books cannot be written", lasts=3_600)


async def _capped(world: World) -> None:
    """A budget of forty cents an hour, for whoever serves from now on."""
    world.budgets = (Budget(Period.HOUR, hard=Decimal("0.40")),)
    await world.kill_and_restart(world.served[0], timedelta(seconds=1))


# -- scenes ----------------------------------------------------------------------------------------------------

PLAIN: Final = Direction(_few)
BUSY: Final = Direction(lambda: [_order(n, 60.0 + 2 * n, seconds=200.0) for n in range(1, 13)])
UNHEARD: Final = Direction(_few, ((30.0, _call("POST servers", reply="lost", works=True)),))
DEAF_MACHINE: Final = Direction(_few, ((400.0, _deaf),))
BUDGET: Final = Direction(lambda: [_order(n, 120.0 + n, seconds=150.0) for n in range(1, 10)], ((1.0, _capped),))
STRANGER: Final = Direction(_few, ((200.0, _stranger),))
LOST_SUBMIT: Final = Direction(
    lambda: [_order(1, 60.0), _order(2, 320.0)],
    ((300.0, _comfyui("POST", "/prompt", Fault.lost(work=True), times=2)),),
)
FAILING: Final = Direction(lambda: [_order(1, 60.0, kind="fails"), _order(2, 90.0)])
CORRUPT: Final = Direction(
    lambda: [_order(1, 60.0), _order(2, 330.0)],
    ((310.0, _comfyui("GET", "/view", Fault.corrupted(flip), times=100)),),
)
SAME_KEY: Final = Direction(lambda: [_order(1, 60.0, key="key-1", again_after=(30.0, 900.0)), _order(2, 90.0)])
CANCELLED: Final = Direction(lambda: [_order(1, 60.0, seconds=200.0, cancel_after=100.0), _order(2, 90.0)])
SILENT_SOCKET: Final = Direction(lambda: [_order(1, 60.0, seconds=300.0)], ((320.0, _silent),))
TWO_SERVICES: Final = Direction(lambda: [_order(n, 60.0 + 5 * n, seconds=8.0) for n in range(1, 7)], ((20.0, _second),))
KILLED: Final = Direction(_long, ((420.0, _killed),))
TOO_MANY: Final = Direction(_few, ((130.0, _call("GET servers*", status=429, headers={"Retry-After": "45"}, times=2)),))
FULL: Final = Direction(_few, ((50.0, _full),))
