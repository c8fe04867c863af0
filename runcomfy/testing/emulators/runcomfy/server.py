"""
The emulated RunComfy cloud: its Server API for dedicated machines, over HTTP on loopback.

It behaves as RunComfy's API reference says (bare arrays and objects, times counted from Ready, one request a second)
unless it is told to misbehave: `next_call` for single calls, `next_machine` for machines. It keeps its own books of
what bills, which are the truth that tests and the demo compare a client's books with. No GPU is involved, and the
models' work is emulated.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote
from uuid import uuid4

from aiohttp import web

from runcomfy.testing.emulators.runcomfy import comfyui_host
from runcomfy.testing.emulators.runcomfy.cloud import EmulatedCloud
from runcomfy.testing.emulators.runcomfy.comfyui_host import ComfyUIFactory, emulated_comfyui, spawn
from runcomfy.testing.emulators.runcomfy.faults import Outcome
from runcomfy.testing.emulators.runcomfy.machines import (
    DEFAULT_RATES,
    Bill,
    EmulatedMachine,
    Span,
    Stage,
    Traits,
    bill_of,
    in_seconds,
)

DEFAULT_TOKEN: Final = "emulated-token-1"  # noqa: S105 - it opens nothing but an emulator
DEFAULT_USER: Final = "emulated-user"
DEFAULT_WORKFLOWS: Final[Sequence[Mapping[str, str]]] = (
    {
        "workflow_id": "7f0c1f3e-0c5b-4a39-8f43-52c6f1b0a001",
        "workflow_name": "generate_flux_mesh",
        "version_id": "b8e2f6d4-3a91-4d07-9c55-0f4e7a1d2002",
        "created_at": "2026-01-12T09:00:00.000000Z",
        "updated_at": "2026-01-12T09:00:00.000000Z",
    },
)
DEFAULT_BOOT_TIME: Final = timedelta(seconds=180)
"""The median that users of RunComfy report for a dedicated machine."""

_USER_PATH: Final = re.compile(r"/prod/api/users/(?P<user>[^/]+)/(?P<rest>.+)")
_ROUTES: Final[Sequence[tuple[str, re.Pattern[str], str]]] = (
    ("GET", re.compile(r"workflows"), "workflows"),
    ("GET", re.compile(r"servers"), "list"),
    ("POST", re.compile(r"servers"), "launch"),
    ("GET", re.compile(r"servers/(?P<server>[^/]+)"), "status"),
    ("POST", re.compile(r"servers/(?P<server>[^/]+)/update-estimated-duration"), "duration"),
    ("DELETE", re.compile(r"servers/(?P<server>[^/]+)"), "stop"),
)


@dataclass(frozen=True, slots=True)
class _Route:
    name: str
    call: str
    user: str = ""
    server: str = ""


class RunComfyEmulator(EmulatedCloud):
    """An emulated cloud with one account.

    `async with RunComfyEmulator() as cloud:` listens on a free loopback port; `cloud.environment()` has the variables
    that point a client at it. Times come from the running loop, so that a test under virtual time moves the cloud too.
    """

    machines: dict[str, EmulatedMachine]
    """Every machine there ever was, by id."""
    launched: list[str]
    """The ids of the machines that clients launched, in order."""
    spent_elsewhere_usd: Decimal
    """What other products of the provider have taken off the balance; negative: money was paid in."""
    page_size: int | None
    """If set, the list of machines comes in pages of that many, wrapped in an object that says so."""

    def __init__(
        self,
        *,
        token: str = DEFAULT_TOKEN,
        second_token: str | None = None,
        user_id: str = DEFAULT_USER,
        workflows: Sequence[Mapping[str, Any]] = DEFAULT_WORKFLOWS,
        boot_time: Span | Callable[[], Span] = DEFAULT_BOOT_TIME,
        delete_takes: Span = 3.0,
        comfyui: bool = True,
        comfyui_factory: ComfyUIFactory | None = None,
        comfyui_speed: float = 1.0,
        rates: Mapping[str, Decimal] = DEFAULT_RATES,
        balance_usd: Decimal | None = Decimal(25),
        rate_limit: bool = True,
        requests_per_second: float = 1.0,
        burst: int = 10,
        retry_after: str | None = None,
        folder: Path | None = None,
        now: Callable[[], datetime] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        """Nothing listens before `start`.

        `boot_time` says how long machines are `Starting`; a function is asked for each launch. `delete_takes` is how
        long they are `Deleting`. With `comfyui` each machine runs an emulated ComfyUI when Ready, `comfyui_speed` times
        as quick as life; `comfyui_factory` makes another server instead; without, addresses lead nowhere. `rates` are
        the machine types with their price in USD per hour. What machines cost is taken off `balance_usd`; None: there
        is no such endpoint. `retry_after` is the header that comes with 429 (RunComfy documents none). Machines keep
        their files in `folder`, by default a temporary one. `now` is the cloud's clock, by default a stamp taken at
        the first request plus the loop's time.
        """
        super().__init__(folder=folder, now=now, host=host, port=port)
        self.token, self.second_token, self.user_id = token, second_token, user_id
        self.workflows = [dict(workflow) for workflow in workflows]
        self.boot_time, self.delete_takes = boot_time, delete_takes
        self.rates = dict(rates)
        self.balance_usd = balance_usd
        self.spent_elsewhere_usd = Decimal(0)
        self.rate_limit, self.requests_per_second, self.burst = rate_limit, requests_per_second, burst
        self.retry_after = retry_after
        self.page_size = None
        self.machines = {}
        self.launched = []
        self._revoked: set[int] = set()
        self._next_traits: list[Traits] = []
        self._comfyui = comfyui or comfyui_factory is not None
        self._factory, self._speed = comfyui_factory, comfyui_speed
        self._tokens_left = float(burst)
        self._tokens_at: float | None = None
        self._host = host

    # --- life ---------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """End everything: machines, their ComfyUI, the API. Harmless when repeated.

        Raises what went wrong in the emulator itself, if anything did.
        """
        self._closing.set()
        for machine in self.machines.values():
            machine.cancel_timers()
            for task in list(machine.work):
                task.cancel()
            await asyncio.gather(*machine.work, return_exceptions=True)
            await comfyui_host.take_down(machine)
        await super().stop()
        errors = [error for machine in self.machines.values() for error in machine.errors]
        for machine in self.machines.values():
            machine.errors.clear()
        if errors:
            raise errors[0]

    def environment(self) -> dict[str, str]:
        """Return the variables that point a client at this cloud."""
        named = {
            "RUNCOMFY_API_BASE_URL": self.url,
            "RUNCOMFY_USER_ID": self.user_id,
            "RUNCOMFY_API_TOKEN": self.token,
        }
        if self.second_token is not None:
            named["RUNCOMFY_API_TOKEN_2"] = self.second_token
        if self.workflows:
            named["RUNCOMFY_WORKFLOW_VERSION_ID"] = str(self.workflows[0].get("version_id", ""))
        return named

    # --- the books ----------------------------------------------------------------------------------------

    @property
    def books(self) -> dict[str, Bill]:
        """What every machine cost so far, by id."""
        now = self.now()
        return {server_id: bill_of(machine, now) for server_id, machine in self.machines.items()}

    @property
    def billing(self) -> list[str]:
        """The machines that bill now, except those that the user started elsewhere."""
        return [machine.server_id for machine in self.machines.values() if machine.bills and not machine.foreign]

    @property
    def alive(self) -> list[str]:
        """The machines that exist, whether they bill or not, except those that the user started elsewhere."""
        return [m.server_id for m in self.machines.values() if m.stage is not Stage.GONE and not m.foreign]

    @property
    def total_usd(self) -> Decimal:
        """What all machines of clients cost so far."""
        return sum((bill.usd for bill in self.books.values() if not bill.foreign), Decimal(0))

    @property
    def money_usd(self) -> Decimal:
        """What is left of the account's money: machines, whoever started them, and other products are paid from it."""
        spent = sum((bill.usd for bill in self.books.values()), self.spent_elsewhere_usd)
        return (self.balance_usd or Decimal(0)) - spent

    # --- misbehaving --------------------------------------------------------------------------------------

    def next_machine(self, **traits: Any) -> Traits:
        """Let the next machine misbehave; the arguments are those of `Traits`. Several calls queue up.

        Returned is what to forget.
        """
        self._next_traits.append(Traits(**traits))
        return self._next_traits[-1]

    def forget_machine(self, traits: Traits) -> bool:
        """Let no next machine misbehave like this; return whether one would have."""
        left = [each for each in self._next_traits if each is not traits]
        was, self._next_traits = len(left) < len(self._next_traits), left
        return was

    def end_by_hand(self, machine: EmulatedMachine) -> None:
        """Delete a machine, as its user does on the website."""
        self._end(machine)

    def lose(self, machine: EmulatedMachine) -> None:
        """Let a machine be gone from one moment to the next, as one that crashed."""
        if machine.stage is not Stage.GONE:
            self._gone(machine)

    def behave(self) -> None:
        """Switch every fault off; machines that exist keep their traits."""
        self._faults.clear()
        self._next_traits.clear()
        self._revoked.clear()

    def forgive(self) -> None:
        """Take every token again."""
        self._revoked.clear()

    def plan_end_again(self, machine: EmulatedMachine) -> None:
        """Heed its stop time again after `ignores_stop_time` was changed; what is over ends at once."""
        if machine.stage is Stage.READY:
            self._plan_end(machine)

    def revoke(self, token: int = 1) -> None:
        """Refuse the first or second token from now on."""
        self._revoked.add(token)

    def foreign(self, server_type: str = "large", *, duration: int = 3600, **traits: Any) -> EmulatedMachine:
        """Let a machine appear that the user started elsewhere; it is Ready and bills."""
        machine = self._make(server_type, duration, "", Traits(**traits))
        machine.foreign = True
        machine.stage, machine.ready_at = Stage.READY, machine.launched_at
        machine.url = f"https://{machine.server_id}-comfyui.runcomfy.invalid"
        self._plan_end(machine)
        return machine

    # --- machines -----------------------------------------------------------------------------------------

    def _make(self, server_type: str, duration: int, version: str, traits: Traits) -> EmulatedMachine:
        machine = EmulatedMachine(
            server_id=str(uuid4()),
            user_id=self.user_id,
            server_type=server_type,
            estimated_duration=duration,
            workflow_version_id=version,
            usd_per_hour=self.rates.get(server_type, Decimal(0)),
            launched_at=self.now(),
            traits=traits,
        )
        self.machines[machine.server_id] = machine
        return machine

    def _launch(self, server_type: str, duration: int, version: str) -> EmulatedMachine:
        traits = self._next_traits.pop(0) if self._next_traits else Traits()
        machine = self._make(server_type, duration, version, traits)
        self.launched.append(machine.server_id)
        if not traits.stuck:
            boot = traits.boot_time
            if boot is None:
                boot = self.boot_time() if callable(self.boot_time) else self.boot_time
            loop = asyncio.get_running_loop()
            machine.timers["boot"] = loop.call_later(in_seconds(boot), lambda: spawn(machine, self._boot(machine)))
        return machine

    async def _boot(self, machine: EmulatedMachine) -> None:
        if machine.traits.fails:
            machine.stage = Stage.FAILED
            return
        machine.url = await comfyui_host.put_up(machine, self._comfyui_factory(), host=self._host)
        if machine.stage is not Stage.STARTING:  # stopped meanwhile
            await comfyui_host.take_down(machine)
            return
        machine.stage, machine.ready_at = Stage.READY, self.now()
        self._plan_end(machine)

    def _comfyui_factory(self) -> ComfyUIFactory | None:
        if not self._comfyui:
            return None
        if self._factory is None:
            self._factory = emulated_comfyui(self._room(), now=lambda: self.now().timestamp(), speed=self._speed)
        return self._factory

    def _plan_end(self, machine: EmulatedMachine) -> None:
        """Arrange for the machine to stop at its stop time (again, if that was changed)."""
        loop = asyncio.get_running_loop()
        old = machine.timers.pop("end", None)
        if old is not None:
            old.cancel()
        stops_at = machine.stops_at
        if stops_at is not None and not machine.traits.ignores_stop_time:
            left = max(0.0, (stops_at - self.now()).total_seconds())
            machine.timers["end"] = loop.call_later(left, lambda: self._end(machine))
        vanishes_after = machine.traits.vanishes_after
        if vanishes_after is not None and "vanish" not in machine.timers:
            machine.timers["vanish"] = loop.call_later(in_seconds(vanishes_after), lambda: self._gone(machine))

    def _end(self, machine: EmulatedMachine) -> None:
        """Begin to delete the machine; from now on it bills no longer."""
        if machine.stage in (Stage.DELETING, Stage.GONE):
            return
        machine.stage = Stage.DELETING
        if machine.ready_at is not None:
            machine.billed_until = self.now()
        machine.cancel_timers()
        spawn(machine, comfyui_host.take_down(machine))
        takes = self.delete_takes if machine.traits.delete_takes is None else machine.traits.delete_takes
        loop = asyncio.get_running_loop()
        machine.timers["gone"] = loop.call_later(in_seconds(takes), lambda: self._gone(machine))

    def _gone(self, machine: EmulatedMachine) -> None:
        machine.cancel_timers()
        machine.stage, machine.gone_at = Stage.GONE, self.now()
        if machine.ready_at is not None and machine.billed_until is None:
            machine.billed_until = machine.gone_at
        if machine.comfyui is not None:
            spawn(machine, comfyui_host.take_down(machine))

    # --- the API ------------------------------------------------------------------------------------------

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        _, body = await self._heard(request)
        if request.rel_url.path.startswith("/__emulator__/"):
            return self._answer_test(request, body)
        route = self._route(request)
        known = route.call if route else f"{request.method} {request.rel_url.raw_path_qs}"
        return await self._tell(
            request,
            known,
            body,
            self._token_of(request),
            lambda works: self._outcome(request, route, body, works=works),
        )

    def _route(self, request: web.BaseRequest) -> _Route | None:
        path = request.rel_url.raw_path
        if request.method == "GET" and path in ("/prod/v2/balance", "/api/auth/me"):
            name = path.rpartition("/")[2]
            return None if name == "balance" and self.balance_usd is None else _Route(name, f"GET {name}")
        prefix = _USER_PATH.fullmatch(path)
        if prefix is None:
            return None
        for method, pattern, name in _ROUTES:
            found = pattern.fullmatch(prefix["rest"])
            if found is not None and method == request.method:
                query = f"?{request.rel_url.raw_query_string}" if request.rel_url.raw_query_string else ""
                server = unquote(found.groupdict().get("server") or "")
                return _Route(name, f"{method} {prefix['rest']}{query}", unquote(prefix["user"]), server)
        return None

    def _token_of(self, request: web.BaseRequest) -> int | None:
        given = request.headers.get("Authorization", "")
        if given == f"Bearer {self.token}":
            return 1
        return 2 if self.second_token is not None and given == f"Bearer {self.second_token}" else None

    def _outcome(self, request: web.BaseRequest, route: _Route | None, body: Any, *, works: bool) -> Outcome:
        """Do what is asked, or only say so if `works` is False."""
        authorization = request.headers.get("Authorization")
        if route is None:
            return _gateway_refusal(authorization)
        token = self._token_of(request)
        if token is None or token in self._revoked:
            return Outcome(401, {"message": "Unauthorized"})
        if route.user and route.user != self.user_id:
            return Outcome(403, {"message": "User is not authorized to access this resource"})
        if not self._takes_turn():
            headers = {} if self.retry_after is None else {"Retry-After": self.retry_after}
            return Outcome(429, {"error_code": "rate_limited", "message": "Too many requests"}, headers)
        if route.name == "launch":
            return self._answer_launch(body, works=works)
        if route.name in ("status", "duration", "stop"):
            return self._answer_machine(route, body, works=works)
        if route.name == "list":
            return self._answer_list(request)
        if route.name == "workflows":
            return Outcome(200, self.workflows)
        if route.name == "balance":
            return Outcome(200, {"balance_usd": float(self.money_usd), "currency": "USD"})
        return Outcome(200, {"id": self.user_id, "email": None, "token_type": "emulated", "token_created_at": None})

    def _takes_turn(self) -> bool:
        """A token bucket for the whole account."""
        if not self.rate_limit:
            return True
        now = asyncio.get_running_loop().time()
        passed = 0.0 if self._tokens_at is None else max(0.0, now - self._tokens_at)
        self._tokens_left = min(float(self.burst), self._tokens_left + passed * self.requests_per_second)
        self._tokens_at = now
        if self._tokens_left < 1:
            return False
        self._tokens_left -= 1
        return True

    def _answer_launch(self, body: Any, *, works: bool) -> Outcome:
        wanted = body if isinstance(body, Mapping) else {}
        server_type, version = wanted.get("server_type"), wanted.get("workflow_version_id")
        duration = wanted.get("estimated_duration")
        if not isinstance(version, str) or version not in {workflow.get("version_id") for workflow in self.workflows}:
            return Outcome(400, {"message": "workflow_version_id does not exist"})
        if not isinstance(server_type, str) or server_type not in self.rates:
            return Outcome(400, {"message": "server_type is not valid"})
        if not isinstance(duration, int) or isinstance(duration, bool) or duration <= 0:
            return Outcome(400, {"message": "estimated_duration must be a positive number of seconds"})
        if self.balance_usd is not None and self.money_usd <= 0:
            return Outcome(402, {"message": "Insufficient balance"})
        machine = self._launch(server_type, duration, version)
        answer = machine.view(self.now())
        if not works:  # a friendly word about a machine that does not exist
            machine.cancel_timers()
            del self.machines[machine.server_id]
            self.launched.remove(machine.server_id)
        if machine.traits.answers_as is not None:
            answer["server_id"] = machine.traits.answers_as
        return Outcome(200, answer)

    def _answer_list(self, request: web.BaseRequest) -> Outcome:
        now = self.now()
        listed = [machine.view(now) for machine in self.machines.values() if machine.is_listed(now)]
        if self.page_size is None:
            return Outcome(200, listed)
        asked = request.rel_url.query.get("page", "1")
        page = int(asked) if asked.isdecimal() else 1
        size = self.page_size
        path = request.rel_url.path
        more = page * size < len(listed)
        return Outcome(
            200,
            {
                "servers": listed[(page - 1) * size : page * size],
                "total": len(listed),
                "page": page,
                "next": f"{path}?page={page + 1}" if more else None,
            },
        )

    def _answer_machine(self, route: _Route, body: Any, *, works: bool) -> Outcome:
        machine, now = self.machines.get(route.server), self.now()
        if machine is None or not machine.is_visible(now):
            return Outcome(404, {"message": "Server not found"})
        if route.name == "duration":
            return self._change_duration(machine, body, works=works)
        if route.name == "stop" and machine.stage is Stage.GONE:
            return Outcome(404, {"message": "Server not found"})
        if route.name == "stop":
            if works and not machine.traits.ignores_delete:
                self._end(machine)
            return Outcome(200, {**machine.view(now), "current_status": machine.traits.status or Stage.DELETING.value})
        return Outcome(200, machine.view(now))

    def _change_duration(self, machine: EmulatedMachine, body: Any, *, works: bool) -> Outcome:
        total = body.get("update_estimated_duration") if isinstance(body, Mapping) else None
        if not isinstance(total, int) or isinstance(total, bool) or total <= 0:
            return Outcome(400, {"message": "update_estimated_duration must be a positive number of seconds"})
        if machine.stage is not Stage.READY:
            return Outcome(400, {"message": "Server is not ready"})
        if works:
            machine.estimated_duration = total
            self._plan_end(machine)
        return Outcome(200, machine.view(self.now()))

    # --- for tests in other processes ---------------------------------------------------------------------

    def _answer_test(self, request: web.BaseRequest, body: Any) -> web.Response:
        """The test-only endpoints: what bills, and faults switched from another process."""
        name = request.rel_url.path.removeprefix("/__emulator__/")
        if (request.method, name) == ("GET", "bill"):
            return web.json_response(
                {
                    "emulated": True,
                    "machines": [bill.as_dict() for bill in self.books.values()],
                    "bills_now": self.billing,
                    "total_usd": str(self.total_usd),
                }
            )
        if (request.method, name) == ("POST", "faults") and isinstance(body, dict):
            try:
                self._switch(body)
            except (TypeError, ValueError) as error:
                return web.json_response({"message": str(error)}, status=400)
            return web.json_response({"ok": True})
        return web.json_response({"message": "GET bill or POST faults"}, status=404)

    def _switch(self, wanted: Mapping[str, Any]) -> None:
        """Switch faults by name: `{"clear": true, "next_call": {...}, "next_machine": {...}, "foreign": {...}}`."""
        unknown = set(wanted) - {"clear", "next_call", "next_machine", "foreign", "revoke"}
        if unknown:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        if wanted.get("clear"):
            self.behave()
        if "next_call" in wanted:
            self.next_call(**wanted["next_call"])
        if "next_machine" in wanted:
            self.next_machine(**wanted["next_machine"])
        if "foreign" in wanted:
            self.foreign(**wanted["foreign"])
        if "revoke" in wanted:
            self.revoke(int(wanted["revoke"]))


def _gateway_refusal(authorization: str | None) -> Outcome:
    """What the AWS gateway in front says to a path it does not know: 403, and the path is not mentioned."""
    if authorization is None:
        return Outcome(403, {"message": "Missing Authentication Token"})
    digest = hashlib.sha256(authorization.encode()).hexdigest()
    text = f"Invalid key=value pair (missing equal-sign) in Authorization header (hashed with SHA-256): '{digest}'."
    return Outcome(403, {"message": text})
