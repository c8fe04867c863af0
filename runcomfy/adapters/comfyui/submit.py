"""
Submits a prompt exactly once, and reads what a refusal says.

`POST /prompt` knows no idempotency and its failures prove nothing: a 500, a timeout or a cut connection may all have
queued the prompt. So the prompt carries our own id, and after an answer that never came the server's queue and history
are searched for it before anything is sent again (I13).
"""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from runcomfy.adapters.comfyui.exchange import Answer, Exchange
from runcomfy.adapters.comfyui.socket import Socket
from runcomfy.domain.exceptions import (
    AnswerUnreadable,
    PromptRejected,
    ProviderError,
    RunComfyError,
    ServerRestarted,
    ServerUnreachable,
    WorkflowInvalid,
    foreign_text,
)
from runcomfy.domain.job import PromptId
from runcomfy.domain.progress import HistoryEntry, QueueView
from runcomfy.ports.comfyui import Submitted

LOOKS: Final = 2
"""Searches in a row that must miss before the prompt counts as never queued."""
LOOK_GAP_SECONDS: Final = 1.5
"""Between two searches: a request that was read late may still be queued by then."""
DOWN_PAUSE_SECONDS: Final = 1.0
_PROMPT_ID: Final = re.compile(r"[!-~]{1,200}")
"""A server may choose another id than ours; it becomes part of a path, and of what people are shown."""
LAST_WORD_SECONDS: Final = 3.0
"""How long a cancelled submission waits for its answer: a prompt queued behind our back could not be taken back."""

_ADVICE: Final[Mapping[str, str]] = {
    "missing_node_type": "install the node pack on the machine, or use a template that has it",
    "invalid_prompt": "install the node pack on the machine, or use a template that has it",
    "prompt_no_outputs": "add a node that saves or previews something",
    "no_prompt": "save the workflow in API format",
    "required_input_missing": "give this input a value or a link",
    "bad_linked_input": 'write a link as ["node id", output number]',
    "return_type_mismatch": "link an output of the type this input takes",
    "invalid_input_type": "give a value of the type this input takes",
    "value_smaller_than_min": "give a larger value",
    "value_bigger_than_max": "give a smaller value",
    "value_not_in_list": "choose one of the values the machine has; a model file may be missing there",
    "custom_validation_failed": "check the file or value named; it may not be on the machine",
    "dependency_cycle": "break the circle of links",
    "exception_during_validation": "check the links of this node",
    "exception_during_inner_validation": "check the links of this node",
}
_DEFAULT_ADVICE: Final = "open the workflow in ComfyUI on that machine and correct it there"


def encode(graph: Mapping[str, Any], *, prompt_id: str, client_id: str) -> bytes:
    """Return the request body. Raises WorkflowInvalid for a graph that is not JSON.

    No `number` is sent (with equal ids it can kill the server's worker), and no `extra_pnginfo` (null breaks the list
    of jobs for everyone).
    """
    body = {"prompt": graph, "client_id": client_id, "prompt_id": prompt_id}
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise WorkflowInvalid(
            f"the workflow cannot be sent as JSON: {foreign_text(error)}",
            hint="use texts, finite numbers, true, false, null, lists and tables only",
        ) from None


class Submission:
    """One prompt on its way to the server."""

    def __init__(
        self,
        exchange: Exchange,
        socket: Socket,
        graph: Mapping[str, Any],
        prompt_id: PromptId,
        *,
        queue: Callable[[], Awaitable[QueueView]],
        history: Callable[[PromptId], Awaitable[HistoryEntry | None]],
        take_back: Callable[[PromptId], Awaitable[None]],
    ) -> None:
        self._exchange = exchange
        self._socket = socket
        self._graph = graph
        self._prompt_id = prompt_id
        self._queue = queue
        self._history = history
        self._take_back = take_back
        self._failed_at: float | None = None

    async def run(self) -> Submitted:
        """Submit. See the port for what it raises."""
        settings = self._exchange.settings
        trouble: RunComfyError | None = None
        for _ in range(settings.max_retries + 1):
            losses = self._socket.losses
            try:
                return await self._post()
            except ServerUnreachable as error:
                trouble = error
                if error.details.get("kind") in ("refused", "dns"):
                    # It never left; there is nothing to look for, only to wait for.
                    await self._until_it_answers(error)
                    self._failed_at = None
                    continue
            except AnswerUnreadable as error:
                trouble = error
            if await self._was_queued():
                return Submitted(self._prompt_id)
            if self._socket.losses != losses:
                raise ServerRestarted(
                    "ComfyUI restarted while the prompt was submitted, or the connection to it broke",
                    hint="run it again",
                    details={"prompt_id": self._prompt_id, "server": self._exchange.address.masked},
                )
        raise self._gave_up(trouble)

    async def _post(self) -> Submitted:
        body = encode(self._graph, prompt_id=self._prompt_id, client_id=self._socket.client_id)
        exchange = self._exchange
        answer = await self._send(body)
        if answer.status == 413:
            raise PromptRejected(
                f"the workflow is larger than {exchange.address.masked} takes ({len(body)} bytes)",
                hint="upload pictures as files instead of writing them into the workflow",
                details={"status": 413, "errors": []},
            )
        if answer.status in (404, 405):
            raise exchange.not_comfyui(f"answers {answer.status} to a prompt")
        if answer.status != 200:
            raise rejection(self._graph, _table(exchange, answer), answer.status)
        said = exchange.json(answer)
        prompt_id = said.get("prompt_id") if isinstance(said, dict) else None
        if not isinstance(prompt_id, str) or not _PROMPT_ID.fullmatch(prompt_id):
            raise AnswerUnreadable(f"{exchange.address.masked} accepted a prompt without naming it")
        if prompt_id != self._prompt_id:
            self._socket.also(self._prompt_id, prompt_id)
        if said.get("node_errors"):
            # Accepted in part: some outputs would silently be missing.
            refused = rejection(self._graph, said, 200)
            try:
                await self._take_back(PromptId(prompt_id))
            except ProviderError as error:
                refused.details["not_taken_back"] = error.message
            raise refused
        number = said.get("number")
        known = isinstance(number, int | float) and not isinstance(number, bool)
        return Submitted(PromptId(prompt_id), float(number) if known else None)

    async def _send(self, body: bytes) -> Answer:
        """POST the prompt. Whoever is cancelled meanwhile waits for the answer a little, to know what to take back."""
        headers = {"Content-Type": "application/json"}
        sending = asyncio.create_task(
            self._exchange.ask("POST", "/prompt", repeat=False, data=io.BytesIO(body), headers=headers)
        )
        try:
            return await asyncio.shield(sending)
        except asyncio.CancelledError:
            await asyncio.wait({sending}, timeout=LAST_WORD_SECONDS)
            raise
        finally:
            sending.cancel()
            if sending.done() and not sending.cancelled():
                sending.exception()

    async def _was_queued(self) -> bool:
        """Search for the prompt; False when it was missed twice in a row, a moment apart."""
        misses = 0
        while True:
            try:
                queue = await self._queue()
                if self._prompt_id in queue.running or self._prompt_id in queue.pending:
                    return True
                if await self._history(self._prompt_id) is not None:
                    return True
                self._failed_at = None
            except (ServerUnreachable, AnswerUnreadable) as error:
                await self._until_it_answers(error)
                continue
            misses += 1
            if misses >= LOOKS:
                return False
            await asyncio.sleep(LOOK_GAP_SECONDS)

    async def _until_it_answers(self, error: RunComfyError) -> None:
        """Pause before the next try; raise the error once the server has been away for too long."""
        now = asyncio.get_running_loop().time()
        if self._failed_at is None:
            self._failed_at = now
        patience = self._exchange.settings.unreachable_timeout.total_seconds()
        while True:
            if asyncio.get_running_loop().time() - self._failed_at >= patience:
                raise error
            await asyncio.sleep(DOWN_PAUSE_SECONDS)
            try:
                await self._exchange.ask("GET", "/prompt", repeat=False)
            except (ServerUnreachable, AnswerUnreadable) as again:
                error = again
            else:
                return  # that something answers proves nothing yet: only a search that succeeds does

    def _gave_up(self, trouble: RunComfyError | None) -> RunComfyError:
        status = trouble.details.get("status") if trouble is not None else None
        if status == 500:
            return PromptRejected(
                f"{self._exchange.address.masked} fails on this workflow (500) and does not queue it",
                hint="check that it is saved in API format; ComfyUI's log on that machine has the reason",
                details={"status": 500, "errors": []},
            )
        return trouble if trouble is not None else ServerUnreachable()


def _table(exchange: Exchange, answer: Answer) -> Mapping[str, Any]:
    """The JSON table of a refusal; an empty one where the server said nothing readable."""
    try:
        said = exchange.json(answer)
    except AnswerUnreadable:
        return {}
    return said if isinstance(said, dict) else {}


# --- what a refusal says ----------------------------------------------------------------------------------


def rejection(graph: Mapping[str, Any], said: Mapping[str, Any], status: int) -> PromptRejected:
    """Return the error for a refused prompt, with every node error: node, title, class, input, reason, what to do."""
    overall = _mapping(said.get("error"))
    errors = [
        _one(graph, str(node), _mapping(entry), _mapping(error))
        for node, entry in _mapping(said.get("node_errors")).items()
        for error in _sequence(_mapping(entry).get("errors"))
    ]
    if not errors and overall:
        extra = _mapping(overall.get("extra_info"))
        node = extra.get("node_id")
        errors = [_one(graph, node if isinstance(node, str) else "", extra, overall)]
    first = errors[0] if errors else None
    kind = foreign_text(overall.get("type") or "", 80)
    details = {"status": status, "type": kind, "errors": errors}
    if first is None:
        return PromptRejected(
            f"ComfyUI refused the workflow ({status}) without saying why", hint=_DEFAULT_ADVICE, details=details
        )
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    taken = "; it was accepted only in part, which is not enough" if status == 200 else ""
    return PromptRejected(
        f"ComfyUI refused the workflow: {_sentence(first)}{more}{taken}", hint=first["hint"], details=details
    )


def _one(graph: Mapping[str, Any], node: str, about: Mapping[str, Any], error: Mapping[str, Any]) -> dict[str, Any]:
    """One error as a flat table of short texts."""
    ours = _mapping(graph.get(node))
    extra = _mapping(error.get("extra_info"))
    kind = foreign_text(error.get("type") or "", 80)
    class_type = about.get("class_type") or ours.get("class_type") or ""
    title = _mapping(ours.get("_meta")).get("title") or about.get("node_title") or class_type
    return {
        "node_id": foreign_text(node, 80),
        "node_title": foreign_text(title, 120),
        "class_type": foreign_text(class_type, 120),
        "input": foreign_text(extra.get("input_name") or "", 120),
        "type": kind,
        "message": foreign_text(error.get("message") or ""),
        "details": foreign_text(error.get("details") or ""),
        "hint": _ADVICE.get(kind, _DEFAULT_ADVICE),
    }


def _sentence(error: Mapping[str, Any]) -> str:
    where = ""
    if error["node_id"]:
        where = f'"{error["node_title"]}" (#{error["node_id"]}' if error["node_title"] else f"node (#{error['node_id']}"
        named = error["class_type"] and error["class_type"] != error["node_title"]
        where += f", {error['class_type']})" if named else ")"
        where += f", input {error['input']}: " if error["input"] else ": "
    what = error["message"] or error["type"]
    return f"{where}{what}" + (f" ({error['details']})" if error["details"] else "")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _sequence(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
