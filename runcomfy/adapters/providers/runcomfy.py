"""
RunComfy's Server API: rent, look, prolong, stop. Keeps `runcomfy.ports.provider.Provider`.

What is retried: reads, changes of duration and stops, when no answer came or the answer was a server's error, with
growing random pauses; every call, when the connection could not even be made, or when RunComfy answered 429. A launch
is never sent again once it may have arrived. Whether the world is as an answer says is for the application to find out.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import aiohttp
from yarl import URL

from runcomfy.adapters.providers import runcomfy_wire as wire
from runcomfy.adapters.providers.runcomfy_errors import Answer, Failure, facts_of, judge, unreadable, wrong_path
from runcomfy.adapters.providers.runcomfy_sending import Call, Sender, checked_root
from runcomfy.domain.balance import Balance
from runcomfy.domain.exceptions import (
    CredentialsMissing,
    LaunchRefused,
    LaunchUnclear,
    MachineNotFound,
    ProviderBusy,
    ProviderError,
    RunComfyError,
    WrongUrl,
)
from runcomfy.domain.machine import CloudWorkflow, MachineReport, Phase, ServerId
from runcomfy.domain.settings import CloudSettings
from runcomfy.ports.clock import Clock
from runcomfy.ports.limiter import Limiter

T = TypeVar("T")

MAX_PAGES: Final = 100
BALANCE_KEPT: Final = timedelta(minutes=1)
"""How long a balance is told again: nobody needs it younger, and stops and launches need the requests."""

_log = logging.getLogger("runcomfy.provider")


class RunComfyAPIClient:
    """One RunComfy account.

    Use it as `async with RunComfyAPIClient(settings, clock=clock) as cloud:`, or call `close()` at the end. An HTTP
    session may be passed in and then stays the caller's to close. Without a limiter this client keeps to the
    account's rate by itself, which is right only while no other process uses the account.
    """

    def __init__(
        self,
        settings: CloudSettings,
        *,
        clock: Clock,
        limiter: Limiter | None = None,
        http: aiohttp.ClientSession | None = None,
    ) -> None:
        """Nothing is sent yet.

        Raises:
            InsecureUrl: the token would travel unencrypted.
            SettingInvalid: the base address is none.
            CredentialsMalformed: a token that cannot be sent.
        """
        self._settings = settings
        self._root = checked_root(settings.base_url)
        self._sender = Sender(settings, event="provider_call", clock=clock, limiter=limiter, http=http)
        self._clock = clock
        self._veil = self._sender.veil
        self._words_seen: set[str] = set()
        """What was logged once and for all: status words, names made up for machines."""
        self._balance: Balance | None = None
        self._balance_asked: float | None = None

    @property
    def name(self) -> str:
        """`runcomfy`."""
        return "runcomfy"

    @property
    def account(self) -> str:
        """A digest of the API's address and the user id."""
        return hashlib.sha256(f"{self._root}\n{self._settings.user_id}".encode()).hexdigest()[:16]

    async def close(self) -> None:
        """End the connections, unless the session was passed in. Harmless when repeated."""
        await self._sender.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- the port -----------------------------------------------------------------------------------------

    async def get_workflows(self) -> Sequence[CloudWorkflow]:
        """Return the workflows saved in the account."""
        call = self._call("GET", "/prod/api/users/{user_id}/workflows", "list the account's workflows")
        return wire.read_workflows(await self._get_whole_list(call, key="version_id"))

    async def list_machines(self, *, urgent: bool = False) -> Sequence[MachineReport]:
        """Return every machine the account has; never a part of the list."""
        call = self._call("GET", "/prod/api/users/{user_id}/servers", "list the account's machines", urgent=urgent)
        entries = await self._get_whole_list(call, key="server_id")
        with self._reading(call):
            reports = wire.read_machines(entries)
        for report in reports:
            self._notice(report)
        return reports

    async def launch_machine(self, *, server_type: str, duration: timedelta, workflow_version_id: str) -> MachineReport:
        """Ask once for one machine and return RunComfy's first word about it.

        Raises `LaunchUnclear` whenever the request may have arrived and no clear answer came. Every other error means
        that nothing was started: `LaunchRefused`, `NoCapacity`, `OutOfCredit` (RunComfy said no), `RateLimited`,
        `ProviderBusy` (it could not be reached).
        """
        body = wire.launch_body(server_type=server_type, duration=duration, workflow_version_id=workflow_version_id)
        call = self._call("POST", "/prod/api/users/{user_id}/servers", "launch a machine", body=body, once=True)
        report = await self._request(call, lambda answer: wire.read_single(wire.read_json(answer.body)))
        self._notice(report)
        return report

    async def get_machine_status(self, server_id: ServerId, *, urgent: bool = False) -> MachineReport | None:
        """Return what RunComfy says about a machine; None if it answers that it knows none (404)."""
        call = self._call("GET", _SERVER, "look at a machine", server_id=server_id, urgent=urgent)
        report = await self._request(call, _about(server_id))
        if report is not None:
            self._notice(report)
        return report

    async def change_duration(self, server_id: ServerId, *, total: timedelta) -> MachineReport:
        """Set the machine's running time, counted from its ready time; a total in the past ends it at once."""
        body = wire.duration_body(total)
        template = f"{_SERVER}/update-estimated-duration"
        call = self._call("POST", template, "change a machine's duration", server_id=server_id, body=body)
        report = await self._request(call, _about(server_id))
        if report is None:
            raise MachineNotFound(f"RunComfy knows no machine {server_id}", details={"server_id": server_id})
        self._notice(report)
        return report

    async def stop_machine(
        self,
        server_id: ServerId,
        *,
        leaving: Callable[[], None] | None = None,
        denied: Callable[[], None] | None = None,
    ) -> bool:
        """Ask for the machine to be stopped; True: accepted, and from now on it bills no longer. False: not known."""
        call = self._call("DELETE", _SERVER, "stop a machine", server_id=server_id, urgent=True)
        if leaving is not None:
            call = replace(call, leaving=leaving)
        if denied is not None:
            call = replace(call, denied=denied)

        def read(answer: Answer) -> bool:
            if answer.status in (202, 204) and not answer.body.strip():
                return True
            if answer.status != 404:
                wire.refuse_errors(wire.read_json(answer.body))  # else a "no" with status 200 would end the bill
            return _about(server_id)(answer) is not None

        return await self._request(call, read)

    async def balance(self) -> Balance | None:
        """Return the account's money; None if RunComfy does not say. The endpoint is not documented.

        Asked at most once a minute, also where there was no answer; every failure of the provider is None.
        """
        now = asyncio.get_running_loop().time()
        if self._balance_asked is None or now - self._balance_asked >= BALANCE_KEPT.total_seconds():
            self._balance_asked, self._balance = now, None
            call = self._call("GET", "/prod/v2/balance", "read the balance", attempts=1)
            with suppress(ProviderError):
                usd = await self._request(call, lambda answer: wire.read_money(wire.read_json(answer.body)))
                self._balance = Balance(usd, self._clock.now()) if usd is not None else None
        return self._balance

    # --- beside the port ----------------------------------------------------------------------------------

    async def whoami(self) -> str | None:
        """Return the user id that belongs to the token; None if RunComfy does not say (not documented).

        Asked at www.runcomfy.com, where RunComfy's own command line asks, if the API is RunComfy's; else at the API.
        """
        site = "https://www.runcomfy.com" if (self._root.host or "").endswith(".runcomfy.net") else ""
        call = self._call("GET", "/api/auth/me", "ask who the token belongs to", attempts=1, site=site)
        try:
            return await self._request(call, lambda answer: wire.read_user_id(wire.read_json(answer.body)))
        except ProviderError:
            return None

    async def probe_host(self) -> None:
        """Find out, without a token, whether RunComfy's API answers at the base address.

        A path that the gateway knows is refused for want of a token; one it does not know is refused with other words.
        Raises WrongUrl, AnswerUnreadable (something else answers there) or ProviderBusy (nobody does).
        """
        path = "/prod/api/users/{user_id}/workflows"
        call = self._call("GET", path, "find RunComfy's API")
        try:
            answer = await self._sender.ask_without_token(call)
        except Failure as failure:
            raise failure.error from None
        facts = facts_of(answer, call=call.name, veil=self._veil)
        if answer.status == 404:
            raise wrong_path(facts)
        if answer.status >= 300:
            error = judge(answer, what=call.what, call=call.name, veil=self._veil).error
            if isinstance(error, WrongUrl | ProviderBusy):
                raise error
        with self._reading(call, facts):
            payload = wire.read_json(answer.body)
            if answer.status < 300 and not isinstance(payload, list):
                raise wire.Unreadable("it answers without a token, and with something else")

    # --- machinery ----------------------------------------------------------------------------------------

    def _call(
        self,
        method: str,
        template: str,
        what: str,
        *,
        server_id: ServerId | None = None,
        body: Mapping[str, Any] | None = None,
        site: str = "",
        **options: Any,
    ) -> Call:
        """Return a call to the API, or to `site`, another address; `options` are `Call`'s."""
        path = template.replace("{user_id}", quote(self._settings.user_id, safe=""))
        path = path.replace("{server_id}", quote(server_id or "", safe=""))
        url = URL(f"{site or str(self._root).rstrip('/')}{path}", encoded=True)
        about = {} if server_id is None else {"server_id": server_id}
        sent = None if body is None else json.dumps(body).encode()
        return Call(method, template, what, url, sent, about, **options)

    async def _get_whole_list(self, call: Call, *, key: str) -> list[Mapping[str, Any]]:
        """Fetch a list with all its pages. A part of it, or a page that repeats another, raises AnswerUnreadable."""
        entries: list[Mapping[str, Any]] = []
        seen: set[str] = set()
        url = call.url
        for _ in range(MAX_PAGES):
            asked = replace(call, url=url)
            page = await self._request(asked, lambda answer: wire.read_page(wire.read_json(answer.body)))
            keys = {str(entry[key]) for entry in page.entries if entry.get(key)}
            with self._reading(call):
                if keys & seen:
                    raise wire.Unreadable("a page of the list that repeats an earlier one")
                seen |= keys
                entries.extend(page.entries)
                if page.next is None:
                    if page.total is not None and page.total != len(entries):
                        raise wire.Unreadable(f"{len(entries)} entries of a list of {page.total}")
                    return entries
                url = self._next_url(page.next, call)
        raise unreadable("a list without an end", what=call.what, facts={"call": call.name})

    def _next_url(self, following: str | int, call: Call) -> URL:
        """Return the address of the next page. It must be the same path at the same host: the token goes along."""
        here = call.url
        if isinstance(following, int):
            return URL(f"{here}?page={following}", encoded=True)
        try:
            there = here.join(URL(following, encoded=True))
        except ValueError:
            raise wire.Unreadable("a part of a list, with its rest at an address that is none") from None
        if there.origin() != here.origin() or there.raw_path != here.raw_path or not there.raw_query_string:
            raise wire.Unreadable("a part of a list, with its rest at another address")
        return URL(f"{here}?{there.raw_query_string}", encoded=True)

    async def _request(self, call: Call, read: Callable[[Answer], T]) -> T:
        """Make a call until it is answered or not worth repeating, and read the answer."""
        settings = self._settings
        if not settings.user_id or not settings.tokens:
            missing = "user id" if settings.tokens else "API token"
            raise CredentialsMissing(
                f"no RunComfy {missing} is set",
                hint="set RUNCOMFY_USER_ID and RUNCOMFY_API_TOKEN, or write them into credentials.txt",
            )
        try:
            return await self._sender.request(call, lambda answer: self._meaning(call, read, answer))
        except Failure as failure:
            raise _final(call, failure) from None

    def _meaning(self, call: Call, read: Callable[[Answer], T], answer: Answer) -> T:
        """Read an answer. Raises Failure if it is none, or a refusal."""
        unknown = answer.status == 404 and not answer.is_html
        if 200 <= answer.status < 300 or (unknown and call.about):
            try:
                return read(answer)
            except wire.Unreadable as error:
                facts = facts_of(answer, call=call.name, veil=self._veil)
                raise Failure(unreadable(error, what=call.what, facts=facts), again=True, arrived=True) from None
        if unknown and not call.once:
            facts = facts_of(answer, call=call.name, veil=self._veil)
            raise Failure(wrong_path(facts), again=False, arrived=False)
        raise judge(answer, what=call.what, call=call.name, veil=self._veil, launch=call.once)

    @contextmanager
    def _reading(self, call: Call, facts: Mapping[str, Any] | None = None) -> Iterator[None]:
        try:
            yield
        except wire.Unreadable as error:
            raise unreadable(error, what=call.what, facts=facts or {"call": call.name}) from None

    def _notice(self, report: MachineReport) -> None:
        """Log a status word that we do not know, and a machine that cannot be asked about, once."""
        if not report.addressable and report.server_id not in self._words_seen and len(self._words_seen) < 100:
            self._words_seen.add(report.server_id)
            _log.warning("provider_machine_id_unusable", extra={"fields": {"called": report.server_id}})
        if report.phase is Phase.UNKNOWN and report.status not in self._words_seen and len(self._words_seen) < 100:
            self._words_seen.add(report.status)
            fields = {"status": self._veil(report.status), "server_id": report.server_id}
            _log.warning("provider_status_unknown", extra={"fields": fields})


_SERVER: Final = "/prod/api/users/{user_id}/servers/{server_id}"


def _about(server_id: ServerId) -> Callable[[Answer], MachineReport | None]:
    """Return a reader of answers about that machine: None for 404."""

    def read(answer: Answer) -> MachineReport | None:
        if answer.status == 404:
            return None
        return wire.read_single(wire.read_json(answer.body), expected=server_id)

    return read


def _final(call: Call, failure: Failure) -> RunComfyError:
    """Return what the caller of a failed call is told; of a launch, whether a machine may run."""
    error = failure.error
    if not call.once:
        return error
    if failure.arrived:
        return LaunchUnclear(
            f"the launch was sent and not clearly answered ({error.message}); a machine may have been started",
            hint="look with `comfyctl machines ls` before launching again",
            details={**error.details, "cause": error.code},
        )
    if type(error) is ProviderError:
        return LaunchRefused(error.message, hint=error.hint, details=error.details)
    return error
