"""What goes wrong with the cloud in a simulated day: its calls, its machines, and people at its website."""

from __future__ import annotations

from datetime import timedelta
from email.utils import format_datetime
from typing import Any, Final

from runcomfy.testing.emulators.runcomfy.faults import CallFault
from runcomfy.testing.simulation.harm import Harm

LAUNCH: Final = "POST servers"
LIST: Final = "GET servers"
STATUS: Final = "GET servers/*"
LONGER: Final = "POST servers/*/update-estimated-duration"
STOP: Final = "DELETE servers/*"
ANY: Final = "*"
CALLS: Final = (LAUNCH, LIST, LIST, STATUS, LONGER, STOP, ANY)
PATIENCE: Final = 900.0
"""Seconds after which a fault that no call met is taken back."""
REPLIES: Final = ("lost", "reset", "never", "truncated", "html", "empty", "drip")
"""Not `endless`: in virtual time no time passes while somebody writes, so nobody's patience would ever end."""
NO: Final = (400, 403, 404, 409)
VISIBLE_AFTER: Final = 115.0
"""Seconds after which every machine has been in a list that was not wrong: less than the visibility window."""


def _arm(harm: Harm, number: int, words: str, call: str, *, patience: float = PATIENCE, **fault: Any) -> CallFault:
    """Let calls go wrong, for a while at most."""
    armed = harm.world.cloud.next_call(call, **fault)
    harm.note(number, words, lasts=patience)
    harm.later(patience, lambda: harm.world.cloud.forget_call(armed))
    return armed


# -- launches --------------------------------------------------------------------------------------------------


async def launch_unheard(harm: Harm) -> None:
    """A launch works and its answer does not arrive, or cannot be read."""
    reply = harm.draw.choice(REPLIES)
    number = 6 if reply in ("truncated", "html", "empty") else 4
    _arm(harm, number, f"a launch will work, its answer: {reply}", LAUNCH, reply=reply, works=True)


async def launch_error(harm: Harm) -> None:
    """A launch is answered with a server's error; it may have worked."""
    status, works = harm.draw.choice((500, 502, 504)), harm.draw.random() < 0.6
    _arm(harm, 5, f"a launch will be answered {status}, works: {works}", LAUNCH, status=status, works=works)


async def launch_in_vain(harm: Harm) -> None:
    """A launch is answered with an id that never shows."""
    _arm(harm, 8, "a launch will be answered with an id of nothing", LAUNCH, works=False)


async def launch_late(harm: Harm) -> None:
    """A launch works, and is answered after the client gave up."""
    _arm(harm, 4, "a launch will be answered after 45 s", LAUNCH, delay=45.0)


async def launch_same_id(harm: Harm) -> None:
    """A launch is answered with the id of a machine that was there before."""
    known = [machine.server_id for machine in harm.machines()]
    traits = harm.world.cloud.next_machine(answers_as=harm.draw.choice(known))
    harm.note(7, "the next launch will be answered with another machine's id", lasts=PATIENCE)
    harm.later(PATIENCE, lambda: harm.world.cloud.forget_machine(traits))


async def no_stock(harm: Harm) -> None:
    """Launches are refused: credit, quota, stock."""
    status = harm.draw.choice((402, 409, 403, 400))
    message = {"message": "Insufficient balance" if status == 402 else "No capacity for this server type"}
    times = harm.draw.randint(1, 3)
    _arm(harm, 27, f"{times} launches will be refused with {status}", LAUNCH, status=status, body=message, times=times)


# -- calls -----------------------------------------------------------------------------------------------------


async def call_unheard(harm: Harm) -> None:
    """An answer of any call does not arrive, or cannot be read."""
    call, reply = harm.draw.choice(CALLS), harm.draw.choice(REPLIES)
    times, works = harm.draw.choice((1, 1, 2, 5)), harm.draw.random() < 0.7
    number = 74 if reply == "html" else 32 if reply == "drip" else 31
    words = f"{times} x {call} will be answered: {reply}, works: {works}"
    _arm(harm, number, words, call, reply=reply, works=works, times=times)


async def call_error(harm: Harm) -> None:
    """Calls are answered with an error."""
    call, status = harm.draw.choice(CALLS), harm.draw.choice((500, 502, 503, 504))
    times = harm.draw.choice((1, 2, 4, 8))
    _arm(harm, 31, f"{times} x {call} will be answered {status}", call, status=status, times=times)


async def too_many(harm: Harm) -> None:
    """Calls are answered 429 or 503, with every kind of Retry-After."""
    date = format_datetime(harm.world.now + timedelta(seconds=20), usegmt=True)
    value = harm.draw.choice(("1", "7", "30", date, "-5", "864000", "soon", None))
    headers = {} if value is None else {"Retry-After": value}
    call, status = harm.draw.choice(CALLS), harm.draw.choice((429, 429, 503))
    times = harm.draw.choice((1, 2, 3))
    words = f"{times} x {call} will be answered {status}, Retry-After {value}"
    _arm(harm, 25, words, call, status=status, headers=headers, times=times)


async def token_refused(harm: Harm) -> None:
    """The credentials are refused for a while."""
    seconds = harm.draw.choice((20.0, 90.0, 400.0))
    harm.world.cloud.revoke()
    harm.note(26, f"the token is refused for {seconds:.0f} s", lasts=seconds)
    harm.later(seconds, harm.world.cloud.forgive)


async def provider_down(harm: Harm) -> None:
    """The provider's API answers nobody for a while."""
    minutes = harm.draw.choice((2, 5, 12, 40))
    fault = harm.draw.choice(({"status": 503}, {"reply": "lost", "works": False}, {"status": 200, "body": "<html>"}))
    words = f"the provider is away for {minutes} min: {fault}"
    # Also where a captive portal answers for it (74): that number is used for single answers, too, and nobody hears the
    # provider in all these minutes (I2 is promised from when it can be heard).
    _arm(harm, 29, words, ANY, patience=60.0 * minutes, times=None, works=False, **_without(fault, "works"))


def _without(fault: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in fault.items() if key != name}


async def slow_answers(harm: Harm) -> None:
    """Answers take long."""
    seconds, times = harm.draw.choice((5.0, 15.0, 40.0)), harm.draw.randint(1, 4)
    _arm(harm, 31, f"{times} calls will be answered after {seconds:.0f} s", ANY, delay=seconds, times=times)


# -- lists -----------------------------------------------------------------------------------------------------


async def list_empty(harm: Harm) -> None:
    """A list is empty by mistake.

    Never two in a row: of a launch that was not answered there is no id to ask for, and the second list is all there is
    against the first (I3).
    """
    if harm.empty_list is not None:
        harm.world.cloud.forget_call(harm.empty_list)
    harm.empty_list = _arm(harm, 11, "a list will be empty", LIST, body=[])


async def list_paged(harm: Harm) -> None:
    """Lists come in pages, and the second may fail or repeat the first."""
    cloud, seconds = harm.world.cloud, harm.draw.choice((60.0, 300.0))
    cloud.page_size = 1
    harm.note(10, f"lists come in pages of one for {seconds:.0f} s", lasts=seconds)
    harm.later(seconds, lambda: setattr(cloud, "page_size", None))
    if harm.draw.random() < 0.5:
        _arm(harm, 10, "second pages fail", "GET servers?page=2", status=500, times=3)


async def strange_words(harm: Harm) -> None:
    """A machine is told of in words nobody knows, or with nothing in them."""
    machine = harm.draw.choice(harm.machines())
    seconds = harm.draw.choice((30.0, 120.0, 400.0))
    if harm.draw.random() < 0.5:
        machine.traits.status = harm.draw.choice(("Migrating", "", "READY", "Hibernating"))
        words = f"is called {machine.traits.status!r}"
    else:
        field = harm.draw.choice(("estimated_stopping_at", "service_ready_at", "main_service_url", "server_type"))
        machine.traits.fields = {field: harm.draw.choice((None, 17, "?", []))}
        words = f"is told of with {machine.traits.fields}"
    harm.note(13, f"{words} for {seconds:.0f} s", lasts=seconds, machine=machine.server_id)

    def undo() -> None:
        machine.traits.status, machine.traits.fields = None, {}

    harm.later(seconds, undo)


async def unlisted(harm: Harm) -> None:
    """A machine is missing from lists while it bills; its status is still told."""
    machine = harm.draw.choice(harm.machines())
    age = (harm.world.now - machine.launched_at).total_seconds()
    seconds = harm.draw.choice((20.0, 60.0, 110.0))
    rows = await harm.world.services.machines(open_only=False)
    if age < VISIBLE_AFTER or machine.server_id not in {row.server_id for row in rows}:
        # With 9 on top of it, or with lists that failed so far, it would first show after the time in which every
        # machine shows: a launch that was not answered counts as absent then (I3), and nothing else tells whose it is.
        seconds = min(seconds, max(0.0, VISIBLE_AFTER - age))
    machine.traits.unlisted_for = age + seconds
    harm.note(11, f"is missing from lists for {seconds:.0f} s", lasts=seconds, machine=machine.server_id)


async def late_machine(harm: Harm) -> None:
    """The next machine shows late, in lists or by its id."""
    seconds = harm.draw.uniform(30, VISIBLE_AFTER)
    traits = harm.world.cloud.next_machine(unlisted_for=seconds, hidden_for=harm.draw.choice((0.0, min(seconds, 50.0))))
    harm.note(9, f"the next machine will show after {seconds:.0f} s", lasts=PATIENCE)
    harm.later(PATIENCE, lambda: harm.world.cloud.forget_machine(traits))


# -- machines --------------------------------------------------------------------------------------------------


async def bad_start(harm: Harm) -> None:
    """The next machine does not start as it should."""
    manner: dict[str, Any] = harm.draw.choice(
        (
            {"stuck": True},
            {"fails": True},
            {"boot_time": 1_200.0},
            {"comfyui": "502", "comfyui_for": 90.0},
            {"comfyui": "html", "comfyui_for": 200.0},
            {"comfyui": "refused", "comfyui_for": 60.0},
            {"comfyui": "502"},
        )
    )
    traits = harm.world.cloud.next_machine(**manner)
    number = 15 if "comfyui" in manner else 14
    harm.note(number, f"the next machine will have {manner}", lasts=PATIENCE)
    harm.later(PATIENCE, lambda: harm.world.cloud.forget_machine(traits))


async def flapping(harm: Harm) -> None:
    """A machine turns from Ready to Starting and back."""
    machine = harm.draw.choice(harm.ready())
    machine.traits.flaps, seconds = harm.draw.choice((15.0, 40.0, 90.0)), harm.draw.choice((120.0, 500.0))
    harm.note(16, f"flaps for {seconds:.0f} s", lasts=seconds, machine=machine.server_id)
    harm.later(seconds, lambda: setattr(machine.traits, "flaps", None))


async def ignores_stop(harm: Harm) -> None:
    """Stops are answered with yes, or fail, and the machine runs on for a while."""
    machine = harm.draw.choice(harm.machines())
    seconds = harm.draw.choice((60.0, 300.0, 1_500.0))
    machine.traits.ignores_delete = True
    words = f"ignores stops for {seconds:.0f} s"
    if harm.draw.random() < 0.4:
        machine.traits.ignores_stop_time = True
        words += ", and its planned stop"
    harm.note(19, words, lasts=seconds, machine=machine.server_id)

    def undo() -> None:
        machine.traits.ignores_delete = machine.traits.ignores_stop_time = False
        harm.world.cloud.plan_end_again(machine)

    harm.later(seconds, undo)


async def stop_fails(harm: Harm) -> None:
    """Stops are answered with an error, whether they work or not, or with 404."""
    status, works = harm.draw.choice((500, 502, 404)), harm.draw.random() < 0.5
    times = harm.draw.choice((1, 2, 6, 20))
    number = 20 if status == 404 else 18 if works else 21
    words = f"{times} stops will be answered {status}, works: {works}"
    _arm(harm, number, words, STOP, status=status, works=works, times=times)


async def ignores_lease(harm: Harm) -> None:
    """A machine runs on when its time is up."""
    machine = harm.draw.choice(harm.machines())
    seconds = harm.draw.choice((600.0, 1_800.0))
    machine.traits.ignores_stop_time = True
    harm.note(23, f"ignores its planned stop for {seconds:.0f} s", lasts=seconds, machine=machine.server_id)

    def undo() -> None:
        machine.traits.ignores_stop_time = False
        harm.world.cloud.plan_end_again(machine)

    harm.later(seconds, undo)


async def longer_fails(harm: Harm) -> None:
    """Leases are not extended, or nobody hears that they were."""
    works = harm.draw.random() < 0.5
    times = harm.draw.choice((1, 3, 8))
    fault = harm.draw.choice(({"status": 500}, {"reply": "lost"}, {"status": 404}, {"reply": "truncated"}))
    _arm(harm, 24, f"{times} x longer: {fault}, works: {works}", LONGER, works=works, times=times, **fault)


async def crash(harm: Harm) -> None:
    """A machine is gone from one moment to the next."""
    machine = harm.draw.choice(harm.ready())
    harm.note(22, "is gone: crashed", machine=machine.server_id, lasts=120.0)
    harm.world.cloud.lose(machine)


# -- people ----------------------------------------------------------------------------------------------------


async def deleted_by_hand(harm: Harm) -> None:
    """The user deletes a machine on the website."""
    machine = harm.draw.choice(harm.machines())
    harm.note(68, "is deleted by hand", machine=machine.server_id, lasts=120.0)
    harm.world.cloud.end_by_hand(machine)


async def foreign_machine(harm: Harm) -> None:
    """The user starts a machine elsewhere.

    For another time than ours are launched for: one of the same type, time and moment as a launch of ours whose answer
    was lost is the one that I3 lets us take for it, and nobody could tell.
    """
    kind, minutes = harm.draw.choice(("large", "medium", "extra-large")), harm.draw.choice((15, 45, 120))
    machine = harm.world.cloud.foreign(kind, duration=60 * minutes)
    harm.note(12, f"a {kind} of somebody else appears for {minutes} min", machine=machine.server_id)
