"""What goes wrong with the ComfyUI servers of a simulated day: calls, sockets, prompts, results, processes."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from runcomfy.testing.emulators.comfyui import ComfyUIEmulator, corruption
from runcomfy.testing.emulators.comfyui.faults import (
    INVALID_UTF8,
    MALFORMED_JSON,
    NOT_A_NUMBER,
    Fault,
    PromptFault,
    SocketFault,
)
from runcomfy.testing.emulators.runcomfy.machines import EmulatedMachine
from runcomfy.testing.queue_programs import drawing
from runcomfy.testing.simulation.harm import Harm

PATIENCE: Final = 600.0
READS: Final = ("/queue", "/history/*", "/history/*", "/system_stats", "/object_info/*", "/prompt")
BAD_BODIES: Final = (MALFORMED_JSON, INVALID_UTF8, NOT_A_NUMBER, b"", b"null", b"[]", b'{"queue_running": 7}')


def _one(harm: Harm, *, busy: bool = False) -> tuple[EmulatedMachine, ComfyUIEmulator]:
    return harm.draw.choice(harm.comfyuis(busy=busy))


def _arm(
    harm: Harm, number: int, words: str, method: str, path: str, fault: Fault, *, times: int = 1, busy: bool = False
) -> None:
    machine, comfyui = _one(harm, busy=busy)
    comfyui.faults.add(method, path, fault, times=times)
    harm.note(number, words, lasts=PATIENCE, machine=machine.server_id)
    harm.later(PATIENCE, comfyui.faults.clear)


# -- submit ----------------------------------------------------------------------------------------------------


async def submit_unheard(harm: Harm) -> None:
    """A prompt is queued, and nobody hears of it; or it is not."""
    works = harm.draw.random() < 0.7
    fault = harm.draw.choice(
        (Fault.lost(work=works), Fault.never(work=works), Fault.error(500, work=works), Fault.late(40.0), Fault.page())
    )
    _arm(harm, 34, f"a submit will go wrong: {_told(fault)}", "POST", "/prompt", fault)


async def submit_twice(harm: Harm) -> None:
    """A prompt is queued twice."""
    machine, comfyui = _one(harm)
    comfyui.faults.add("POST", "/prompt", Fault(twice=True))
    harm.doubled.add(machine.server_id)
    harm.note(35, "a prompt will be queued twice", lasts=PATIENCE, machine=machine.server_id)
    harm.later(PATIENCE, comfyui.faults.clear)


# -- prompts ---------------------------------------------------------------------------------------------------


async def prompt_vanishes(harm: Harm) -> None:
    """A prompt disappears from queue and history: before its run, in it, or when it is over."""
    machine, comfyui = _one(harm)
    current = comfyui.process.current
    if current is not None and harm.draw.random() < 0.5:
        harm.note(37, "the running prompt vanishes", machine=machine.server_id, lasts=60.0)
        comfyui.vanish(current.prompt_id)
        return
    where = harm.draw.choice(("start", "end"))
    comfyui.faults.add_prompt(PromptFault(vanish=where))
    harm.note(37, f"the next prompt will vanish at its {where}", lasts=PATIENCE, machine=machine.server_id)
    harm.later(PATIENCE, comfyui.faults.clear)


async def no_outputs(harm: Harm) -> None:
    """A success whose history names no outputs."""
    machine, comfyui = _one(harm)
    comfyui.faults.add_prompt(PromptFault(no_outputs=True))
    harm.note(42, "the next success will have no outputs", lasts=PATIENCE, machine=machine.server_id)
    harm.later(PATIENCE, comfyui.faults.clear)


async def gpu_fails(harm: Harm) -> None:
    """The GPU is full, or broken."""
    machine, comfyui = _one(harm)
    kind, times = harm.draw.choice(("oom", "oom", "cuda")), harm.draw.choice((1, 1, 3))
    comfyui.faults.add_prompt(PromptFault(fails=kind), times=times)
    harm.note(41, f"{times} prompts will fail: {kind}", lasts=PATIENCE, machine=machine.server_id)
    harm.later(PATIENCE, comfyui.faults.clear)


async def stuck(harm: Harm) -> None:
    """A prompt stands still, at its start or late, for minutes."""
    machine, comfyui = _one(harm, busy=True)
    process = comfyui.process
    at, seconds = harm.draw.choice((0.01, 0.5, 0.97)), harm.draw.choice((60.0, 400.0, 1_600.0))
    process.stalls.add("1", at)
    harm.note(39, f"its node stands still at {at:.0%} for {seconds:.0f} s", lasts=seconds, machine=machine.server_id)
    if harm.draw.random() < 0.5:
        comfyui.faults.ignore_interrupts = True
        harm.note(40, "ignores interrupts, too", lasts=seconds, machine=machine.server_id)

    def undo() -> None:
        comfyui.faults.ignore_interrupts = False
        process.stalls.release("1")

    harm.later(seconds, undo)


async def slow_gpu(harm: Harm) -> None:
    """The GPU is five times as slow for a while."""
    machine, comfyui = _one(harm)
    process, seconds = comfyui.process, harm.draw.choice((300.0, 1_200.0))
    process.speed = 0.2
    harm.note(73, f"is slow for {seconds:.0f} s", lasts=seconds, machine=machine.server_id)
    harm.later(seconds, lambda: setattr(process, "speed", 1.0))


async def late_history(harm: Harm) -> None:
    """History is written some time after the success was told."""
    machine, comfyui = _one(harm)
    comfyui.hold_history(harm.draw.choice((2.0, 20.0)))
    harm.note(43, f"writes its history {comfyui.faults.history_delay:.0f} s late", lasts=PATIENCE,
              machine=machine.server_id)  # fmt: skip
    harm.later(PATIENCE, lambda: comfyui.hold_history(0.0))


async def by_hand(harm: Harm) -> None:
    """A person starts a prompt on our machine."""
    machine, comfyui = _one(harm)
    process, draw = comfyui.process, harm.draw
    prompt_id = str(UUID(int=draw.getrandbits(128), version=4))
    graph = drawing(draw.choice((30.0, 120.0, 400.0)), 800_000 + draw.randrange(10_000))
    graph["2"]["inputs"]["filename_prefix"] = "by-hand"
    process.queue.put((process.counter, prompt_id, graph, {"client_id": "a person"}, ["2"], {}))
    process.counter += 1
    harm.by_hand.add(prompt_id)
    harm.note(69, "a person starts a prompt on it", lasts=600.0, machine=machine.server_id)


# -- reads and results -----------------------------------------------------------------------------------------


async def bad_read(harm: Harm) -> None:
    """Queue, history and the like are answered with something else."""
    path, times = harm.draw.choice(READS), harm.draw.choice((1, 2, 6))
    fault = harm.draw.choice(
        (
            Fault.page(),
            Fault.page(502),
            Fault.error(500),
            Fault.lost(),
            Fault.never(),
            Fault.redirected(),
            Fault.saying(harm.draw.choice(BAD_BODIES)),
            Fault.cut(10),
            Fault.slow(20.0),
        )
    )
    number = 48 if fault.work and fault.body is not None else 74 if fault.body is not None else 31
    _arm(harm, number, f"{times} x GET {path} will go wrong: {_told(fault)}", "GET", path, fault, times=times)


async def empty_queue_answer(harm: Harm) -> None:
    """The queue is told to be empty, and the history to know nothing, though a prompt runs."""
    machine, comfyui = _one(harm, busy=True)
    nothing = b'{"queue_running": [], "queue_pending": []}'
    comfyui.faults.add("GET", "/queue", Fault.saying(nothing), times=1)
    if harm.draw.random() < 0.5:
        comfyui.faults.add("GET", "/history/*", Fault.saying(b"{}"), times=1)
    harm.note(37, "tells once that its queue is empty", lasts=PATIENCE, machine=machine.server_id)
    harm.later(PATIENCE, comfyui.faults.clear)


async def cut_result(harm: Harm) -> None:
    """A result is cut, or its length is told wrong, or it drips."""
    times = harm.draw.choice((1, 2, 3))
    fault = harm.draw.choice((Fault.cut(40), Fault.lying(30), Fault.lying(100_000), Fault.slow(15.0), Fault.lost()))
    _arm(harm, 49, f"{times} results will be {_told(fault)}", "GET", "/view", fault, times=times)


async def page_for_result(harm: Harm) -> None:
    """A page comes where a result was expected."""
    _arm(harm, 50, "a page will come in place of a result", "GET", "/view", Fault.page())


async def corrupt_result(harm: Harm) -> None:
    """A result is corrupt, always or only this time."""
    how = harm.draw.choice((corruption.other_bytes_each_time, corruption.empty, half, flip))
    number = 52 if how is corruption.other_bytes_each_time else 51
    times = harm.draw.choice((1, 2, 4))
    _arm(harm, number, f"{times} results will be spoilt: {how.__name__}", "GET", "/view", Fault.corrupted(how),
         times=times)  # fmt: skip


def half(body: bytes, _: int) -> bytes:
    """The first half of a body."""
    return body[: len(body) // 2]


def flip(body: bytes, _: int) -> bytes:
    """A body of which some bytes in the middle are others."""
    middle = len(body) // 2
    return body[:middle] + bytes(byte ^ 0x55 for byte in body[middle : middle + 8]) + body[middle + 8 :]


# -- sockets ---------------------------------------------------------------------------------------------------


async def bad_socket(harm: Harm) -> None:
    """Sockets are refused, silent, cut, repeated, out of order, about others, flooded."""
    machine, comfyui = _one(harm)
    number, fault = harm.draw.choice(
        (
            (44, SocketFault(refuse=403)),
            (45, SocketFault(silent_after=2)),
            (46, SocketFault(abort_after=3)),
            (47, SocketFault(duplicate=True)),
            (47, SocketFault(reorder=True)),
            (47, SocketFault(foreign=True)),
            (47, SocketFault(flood=1)),
        )
    )
    times = harm.draw.choice((1, 3, 50))
    comfyui.faults.add_socket(fault, times=times)
    comfyui.cut_sockets()
    harm.note(number, f"{times} sockets will have {fault}", lasts=PATIENCE, machine=machine.server_id)
    harm.later(PATIENCE, comfyui.faults.clear)


async def bad_frame(harm: Harm) -> None:
    """A frame comes that nobody can read."""
    machine, comfyui = _one(harm)
    payload = harm.draw.choice((MALFORMED_JSON, INVALID_UTF8, NOT_A_NUMBER, b"\x00\x00", b"[[[[[[[["))
    text = harm.draw.random() < 0.7
    harm.note(48, f"sends {payload!r} to everybody", machine=machine.server_id)
    comfyui.inject(None, payload, text=text)


# -- processes -------------------------------------------------------------------------------------------------


async def restart(harm: Harm) -> None:
    """The server dies, and comes back with nothing in its memory, or stays away."""
    machine, comfyui = _one(harm)
    seconds = harm.draw.choice((2.0, 10.0, 60.0, 400.0))
    harm.note(38, f"its ComfyUI dies for {seconds:.0f} s", lasts=seconds + 30.0, machine=machine.server_id)
    await comfyui.kill()

    def back() -> None:
        if machine.comfyui is comfyui and not comfyui.alive and machine.bills:
            harm.spawn(comfyui.restart())

    harm.later(seconds, back)


async def hang(harm: Harm) -> None:
    """The server hangs: connections stay, nothing is answered."""
    machine, comfyui = _one(harm)
    process, seconds = comfyui.process, harm.draw.choice((10.0, 60.0, 200.0))
    harm.note(45, f"its ComfyUI hangs for {seconds:.0f} s", lasts=seconds, machine=machine.server_id)
    process.hang()
    harm.later(seconds, process.resume)


async def worker_dies(harm: Harm) -> None:
    """The server's worker dies; it goes on taking prompts that never run."""
    machine, comfyui = _one(harm)
    harm.note(39, "its worker dies", lasts=3_600.0, machine=machine.server_id)
    comfyui.kill_worker()


def _told(fault: Fault) -> str:
    """Return what a fault does, in few words."""
    plain, names = Fault(), ("work", "status", "reply", "delay", "truncate", "claim", "rate", "endless", "redirect")
    said = [f"{name} {value}" for name in names if (value := getattr(fault, name)) != getattr(plain, name)]
    if fault.body is not None:
        said.append(f"body {fault.body[:20]!r}")
    return ", ".join(said)
