"""What clients send to `comfyctl serve`: bodies, forms, headers, addresses; and what Spaces answer."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from typing import Any, Final

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from yarl import URL

from benchmarks.fuzzing import running
from benchmarks.fuzzing.scratch import scratch
from benchmarks.fuzzing.target import Seeds, Target, demand, only_ours, plain
from launcher import schemas
from launcher.conjure import bodies
from launcher.conjure.hugging_face import _parts
from launcher.conjure.parameters import FLUX_MESH, apply, wanted_mesh
from launcher.files import disposition, range_of
from launcher.guarding import rules
from launcher.guarding.addresses import Address, checked_url, is_public
from launcher.intake import Intake
from launcher.multipart import Form, read_form
from launcher.orders import check_texts, key_of, merged, order_of, whole_body
from launcher.plain_json import plain_json
from launcher.strict_json import strict_json
from launcher.upload_store import UploadStore
from runcomfy.testing import samples

MOST: Final = 32_768


def _request(data: bytes, *headers: tuple[str, str]) -> Request:
    parts = [data[: len(data) // 2], data[len(data) // 2 :]]

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    encoded = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": encoded}, receive)


# --- bodies -------------------------------------------------------------------------------------------------

_ORDERS: Final[tuple[type[BaseModel], ...]] = (
    schemas.JobChange,
    schemas.Again,
    schemas.PauseOrder,
    schemas.StopOrder,
    schemas.PresenceOrder,
    schemas.EstimateOrder,
    bodies.FluxRequest,
    bodies.FluxDepthRequest,
    bodies.PartPackerRequest,
    bodies.MeshImportRequest,
    bodies.ConversationRequest,
    bodies.InstructionRequest,
    bodies.StateUpdateRequest,
)


def _uploads() -> UploadStore:
    return UploadStore(str(scratch()), most_bytes=MOST, max_pixels=65_536)


def _intake() -> Intake:
    """As much of it as values need."""
    intake = Intake.__new__(Intake)
    intake._uploads, intake._brought = _uploads(), []
    return intake


async def _order(data: bytes) -> None:
    with only_ours(RequestValidationError):
        said = strict_json(await whole_body(_request(data), MOST))
        _forms(said)
        order = order_of(said)
        for where in ("inputs", "sets", "metadata"):
            check_texts(getattr(order, where), where)
        intake = _intake()
        for name, value in [("image", order.image), *order.inputs.items()]:
            with only_ours():
                found = await intake._value(name, value, None)
                demand(found == value or str(found).startswith("@"), "a value that was not sent")
        await intake._uploads.forget(intake._brought)
        json.loads(plain_json(order.model_dump()))


def _forms(said: Any) -> None:
    for form in _ORDERS:
        try:
            read = form.model_validate(said)
        except ValidationError:
            continue
        if isinstance(read, bodies.Asked):
            json.loads(plain_json(read.unknown()))
            with only_ours():
                json.dumps([dict(apply(FLUX_MESH, read.parameters()).sets), wanted_mesh(read.parameters())])


def body(data: bytes) -> None:
    """A JSON body."""
    running.run(_order(data))


def _body_seeds() -> Seeds:
    order = {
        "workflow": "flux_image",
        "prompt": "a",
        "seed": 7,
        "inputs": {"steps": 3},
        "sets": {"3.cfg": 2.5},
        "metadata": {"a": [1]},
        "priority": 5,
        "timeout_s": 60,
        "user": "ada",
        "dry_run": True,
    }
    yield "order", json.dumps(order).encode()
    uri = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="  # noqa: E501
    yield "picture", json.dumps({"workflow": "image_invert", "image": uri, "webhook_url": "https://a.b/c"}).encode()
    yield "graph", json.dumps({"workflow": {"1": {"class_type": "A", "inputs": {}}}}).encode()
    flux = {"prompt": "p", "seed": 1, "randomize_seed": False, "width": 1024, "height": 1e3, "guidance_scale": 3.5}
    yield "flux", json.dumps(flux | {"num_inference_steps": 28, "loras": [1]}).encode()
    yield (
        "mesh",
        json.dumps({"image_path": "a.png", "num_steps": 50, "simplify_mesh": True, "target_num_faces": 1e5}).encode(),
    )
    yield (
        "said",
        json.dumps(
            {"event": "batch", "jobs": 5, "seconds": 60, "source": "page", "confirm": True, "first": True}
        ).encode(),
    )
    yield "twice", b'{"a": 1, "a": 2}'
    yield "no-numbers", b'{"workflow": "x", "seed": NaN, "timeout_s": 1e999, "prompt": "\\ud800"}'
    yield "deep", b'{"workflow": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}"


class _Sink:
    def __init__(self) -> None:
        self.size = 0
        self.kept = True

    async def write(self, data: bytes) -> None:
        self.size += len(data)

    async def abort(self) -> None:
        self.kept = False


async def _form(data: bytes) -> None:
    line, _, rest = data.partition(b"\n")
    opened: list[_Sink] = []

    async def open_sink(name: str, file_name: str) -> _Sink:
        plain(name, "a field's name", limit=200)
        opened.append(_Sink())
        return opened[-1]

    whole = False
    try:
        with only_ours(RequestValidationError):
            kind = line.decode("latin-1").strip()
            form: Form = await read_form(_request(rest, ("content-type", kind)), open_sink, field_most=MOST)
            whole = True
            demand(len(form.files) == len(opened), "a file was lost")
            with only_ours(RequestValidationError):
                order_of(merged(form))
    finally:
        demand(whole or not any(sink.kept for sink in opened), "a file of a broken form was kept")


def form(data: bytes) -> None:
    """A multipart body; its first line is the Content-Type."""
    running.run(_form(data))


def _form_seeds() -> Seeds:
    def part(head: str, text: bytes) -> bytes:
        return b"--b\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + text + b"\r\n"

    kind = b"multipart/form-data; boundary=b\n"
    fields = part('name="workflow"', b"flux_image") + part('name="seed"', b"7") + part('name="inputs"', b'{"a": 1}')
    yield "fields", kind + fields + b"--b--\r\n"
    yield "file", kind + fields + part('name="image"; filename="a.png"', samples.png(4, 4)) + b"--b--\r\n"
    yield "job", kind + part('name="job"', b'{"workflow": "x", "sets": {}}') + b"--b--\r\n"
    yield "cut", kind + fields[:-30]
    yield (
        "quoted",
        (
            b'multipart/form-data; boundary="b b"\n--b b\r\n'
            b"content-disposition: form-data; name*=utf-8''a\r\n\r\nx\r\n--b b--"
        ),
    )


# --- heads --------------------------------------------------------------------------------------------------


def head(data: bytes) -> None:
    """A request's line and headers, and everything that decides by them."""
    lines = data.decode("latin-1").split("\n")[:80]
    first = lines[0].split(" ")
    pairs = tuple(
        (name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines[1:])
    )
    told = rules.Head(first[0], first[-1], "http", pairs, ("127.0.0.1", 8000), first[len(first) // 2])
    refusals = (
        rules.host_refused(told, allowed=["mine.example"], bound_host="127.0.0.1"),
        rules.origin_refused(told, allowed=["mine.example"]),
        rules.body_refused(told),
        rules.size_refused(told),
    )
    for refusal in refusals:
        demand(refusal is None or 400 <= refusal.status < 500, "a refusal that is none")
    for answer in (rules.is_conjures(told), rules.is_public(told), rules.conjure_may(told), rules.has_body(told)):
        demand(isinstance(answer, bool), "neither yes nor no")
    if rules.conjure_may(told):
        demand(refusals[1] is None or told.all("origin"), "a page may what only CONJURE may")
    rules.bearer(told)
    rules.cookie(told, "session")
    try:
        length = rules.declared_length(told)
        demand(length is None or length >= 0, "less than nothing")
    except ValueError:
        pass
    for text in told.all("range"):
        found = range_of(text, 1_000)
        demand(found is None or 0 <= found[0] <= found[1] <= 1_000, f"a range {found}")
    demand(all(31 < ord(c) < 127 for c in disposition(lines[-1], download=True)), "a header that can be broken out of")
    with only_ours():
        key_of(_request(b"", *((name, value) for name, value in pairs if name == "idempotency-key")))


def _head_seeds() -> Seeds:
    base = "POST 127.0.0.1 /flux/generate\nhost: 127.0.0.1:8000\ncontent-type: application/json\ncontent-length: 2\n"
    yield "conjure", base.encode()
    yield "page", f"{base}origin: http://127.0.0.1:8000\nsec-fetch-site: same-origin\ncookie: session=a; b=c\n".encode()
    yield "foreign", f"{base}origin: http://[::1\nhost: evil.example\nauthorization: Bearer x\n".encode()
    yield (
        "range",
        b"GET ::1 /\nhost: [::1]:8000\nrange: bytes=0-" + b"9" * 30 + b"\nrange: bytes=-5\nidempotency-key: a",
    )


def address(data: bytes) -> None:
    """An address that a client names, for us to fetch or to tell."""
    text = data.decode("utf-8", "surrogateescape")
    with only_ours():
        url: URL = checked_url(text, allow_private=False)
        demand(url.scheme in ("http", "https") and url.raw_host and not url.user, f"{url!r}")
        try:
            literal: Address = ipaddress.ip_address((url.raw_host or "").rstrip("."))
        except ValueError:
            return
        demand(is_public(literal), f"{literal} is private")


def _address_seeds() -> Seeds:
    for number, text in enumerate(
        (
            "https://example.com/a.png?x=1",
            "http://127.1/",
            "http://0x7f.1/",
            "http://[::ffff:127.0.0.1]/",
            "http://[fe80::1%25eth0]/",
            "http://2130706433/",
            "http://localhost./",
            "http://a@b/",
            "http://\u2460\u2461\u2466.0.0.1/",
            "http://[",
            "file:///etc/passwd",
            "http://example.com:99999/",
            "http://xn--/",
            "http://1.1.1.1/",
            "http://a..b/",
            "https://" + "a" * 64 + ".com/",
            "http://\u3002/",
            "http://169.254.169.254\u3002/",
        )
    ):
        yield f"{number:02}", text.encode()


def space(data: bytes) -> None:
    """What a Space of Hugging Face answers."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError):
        return
    path, seed = _parts(answer, 5)
    demand(path is None or isinstance(path, str), "a path that is none")
    demand(isinstance(seed, int), "a seed that is none")


def _space_seeds() -> Seeds:
    yield "pair", b'[{"path": "/tmp/a.png"}, 12]'
    yield "text", b'"/tmp/a.png"'
    yield "no-number", b'["/tmp/a.png", NaN]'
    yield "endless", b'["/tmp/a.png", Infinity]'


TARGETS: Final = (
    Target(
        "body",
        body,
        _body_seeds,
        share=20,
        words=(
            "workflow",
            "inputs",
            "sets",
            "priority",
            "timeout_s",
            "image",
            "data:image/png;base64,",
            "upload:",
            "webhook_url",
            "num_inference_steps",
            "target_num_faces",
        ),
    ),
    Target(
        "form",
        form,
        _form_seeds,
        share=15,
        is_json=False,
        words=(
            "--b\r\n",
            "--b--",
            "Content-Disposition: ",
            "form-data; ",
            'name="',
            'filename="',
            "\r\n\r\n",
            "boundary=",
        ),
    ),
    Target(
        "head",
        head,
        _head_seeds,
        share=15,
        is_json=False,
        words=(
            "host: ",
            "origin: ",
            "sec-fetch-site: ",
            "cookie: ",
            "range: bytes=",
            "content-length: ",
            "transfer-encoding: chunked",
            "idempotency-key: ",
        ),
    ),
    Target(
        "address",
        address,
        _address_seeds,
        share=10,
        max_bytes=512,
        is_json=False,
        words=("http://", "127.0.0.1", "[::1]", "0x7f", "%25", "\u3002", "xn--", "@", "::ffff:"),
    ),
    Target("space", space, _space_seeds, share=4, max_bytes=512),
)
