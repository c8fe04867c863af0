"""Threat S2: an address that a client names is reached only if it is public, whatever it looks like."""

from __future__ import annotations

import asyncio
import ipaddress
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from launcher.guarding.addresses import Address, check_webhook_url, checked_url, is_public, system_resolve
from launcher.guarding.fetching import MOST_REDIRECTS, Fetched, fetch_public
from runcomfy.domain.exceptions import AddressRefused, DownloadFailed, InputFileInvalid, LocalError
from runcomfy.domain.settings import HttpSettings

PRIVATE = [
    "http://localhost/",
    "http://LOCALHOST./",
    "http://printer.local/",
    "http://metadata.google.internal/",
    "http://127.0.0.1/",
    "http://127.0.0.1:8188/view",
    "http://127.8.9.10/",
    "http://127.1/",
    "http://0x7f.1/",
    "http://0x7f000001/",
    "http://2130706433/",
    "http://017700000001/",
    "http://0177.0.0.1/",
    "http://0/",
    "http://0.0.0.0/",
    "http://10.0.0.1/",
    "http://100.64.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.168.1.1/",
    "http://198.18.0.1/",
    "http://192.0.2.1/",
    "http://224.0.0.1/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://[::1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::ffff:93.184.216.34]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b:1::7f00:1]/",
    "http://[2002:7f00:1::]/",
    "http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fec0::1]/",
    "http://[fc00::1]/",
    "http://[fd12:3456::1]/",
    "http://[ff02::1]/",
    "http://[2001:db8::1]/",
    "http://１２７.0.0.1/",
    "http://①②⑦.⓪.⓪.①/",
    "http://127。0。0。1/",
]
NO_ADDRESS = [
    "",
    "picture.png",
    "/etc/passwd",
    "//example.org/x",
    "file:///etc/passwd",
    "ftp://example.org/x",
    "gopher://example.org/",
    "data:image/png;base64,AAAA",
    "javascript:alert(1)",
    "http://",
    "http:///x",
    "http://user@example.org/",
    "http://user:password@example.org/",
    "http://:password@example.org/",
    "http://example.org@127.0.0.1/",
    "http://example.org:99999/",
    "http://example.org\\@127.0.0.1/",
    "http://exa mple.org/",
    "http://example.org/\r\nHost: evil",
    "http://example.org/\t",
    "http://[::1",
    "http://a..example.org/",
    "http://.example.org/",
    "http://example.org../",
    "http://" + "a" * 64 + ".example.org/",
    "http://example.org/" + "a" * 2_048,
]
PUBLIC = [
    "https://example.org/a.png?b=c#d",
    "http://example.org:8080/",
    "http://93.184.216.34/",
    "http://[2606:2800:220:1::]/",
]


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("url", [*PRIVATE, *NO_ADDRESS])
@pytest.mark.threat("S2")
async def test_no_such_address_is_fetched_or_told(url: str, tmp_path: Path) -> None:
    asked: list[str] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ["93.184.216.34"]

    with pytest.raises(AddressRefused) as caught:
        await fetch_public(url, tmp_path / "file", limit_bytes=10, resolve=resolve)
    with pytest.raises(AddressRefused):
        check_webhook_url(url, HttpSettings())
    assert "password" not in url or "user:password" not in caught.value.message
    assert asked == []
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["a" * 64 + ".example", "a..example"])
async def test_a_name_that_python_cannot_encode_is_one_that_is_not_found(name: str) -> None:
    with pytest.raises(OSError, match="looked up"):
        await system_resolve(name, 80)


@pytest.mark.parametrize("url", NO_ADDRESS)
def test_a_setting_opens_private_addresses_but_nothing_else(url: str) -> None:
    with pytest.raises(AddressRefused):
        check_webhook_url(url, HttpSettings(allow_private=True))


@pytest.mark.parametrize("url", [*PUBLIC, "http://127.0.0.1:9000/hook", "http://localhost/"])
def test_a_setting_opens_private_addresses(url: str) -> None:
    assert check_webhook_url(url, HttpSettings(allow_private=True)).startswith("http")


@pytest.mark.parametrize("url", PUBLIC)
def test_public_addresses_may_be_used(url: str) -> None:
    assert checked_url(url, allow_private=False).host


@given(st.ip_addresses())
@pytest.mark.threat("S2")
def test_what_python_calls_private_is_never_public(address: Address) -> None:
    if is_public(address):
        assert not address.is_private
        assert not address.is_loopback
        assert not address.is_link_local
        assert not address.is_multicast
        assert not address.is_reserved
        assert not address.is_unspecified


@pytest.mark.parametrize("text", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1"])
def test_public_ones_are(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


# --- names, by a resolver that lies -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        ["127.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
        ["::ffff:10.0.0.1"],
        ["64:ff9b::7f00:1"],
        ["93.184.216.34", "127.0.0.1"],
        ["127.0.0.1", "93.184.216.34"],
        ["2606:4700::1111", "fd00::1"],
    ],
)
@pytest.mark.threat("S2")
async def test_a_name_with_a_private_address_is_refused(answer: list[str], tmp_path: Path) -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return answer

    with pytest.raises(AddressRefused, match="rebound"):
        await fetch_public("http://rebound.example:1/", tmp_path / "file", limit_bytes=10, resolve=resolve)


@pytest.mark.parametrize("answer", [["0.0.0.0"], ["::"], ["224.0.0.1"]])  # noqa: S104 - nothing is bound
async def test_some_addresses_are_nobodys_also_where_private_ones_are_allowed(
    answer: list[str], tmp_path: Path
) -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return answer

    with pytest.raises(AddressRefused):
        await fetch_public("http://n.example/", tmp_path / "f", limit_bytes=1, allow_private=True, resolve=resolve)


# --- a server that misbehaves -------------------------------------------------------------------------------

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
OUTSIDE, INSIDE = "127.0.0.2", "127.0.0.1"


def outside(address: Address) -> bool:
    """Stands in for the list of public addresses: in these stories the internet is 127.0.0.2."""
    return str(address) == OUTSIDE


async def says_outside(host: str, port: int) -> Sequence[str]:
    return [OUTSIDE]


@asynccontextmanager
async def serving(handler: Handler, address: str = OUTSIDE) -> AsyncIterator[int]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, address, 0)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        pytest.skip(f"{address} is not on this computer: {error}")  # macOS has 127.0.0.1 only
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def fetch(url: str, folder: Path, **options: Any) -> Fetched:
    given = {"limit_bytes": 1_000, "resolve": says_outside, "public": outside, **options}
    return await fetch_public(url, folder / "file", **given)


async def test_a_file_is_fetched_whole_and_private(tmp_path: Path) -> None:
    async def picture(request: web.Request) -> web.Response:
        assert request.headers["Host"].startswith("pictures.example:")
        assert "Cookie" not in request.headers
        assert "Authorization" not in request.headers
        assert request.headers["Accept-Encoding"] == "identity"
        return web.Response(body=b"PNG" * 100, content_type="image/png")

    async with serving(picture) as port:
        found = await fetch(f"http://pictures.example:{port}/a.png", tmp_path)
    assert (found.size, found.mime) == (300, "image/png")
    assert found.path.read_bytes() == b"PNG" * 100
    if sys.platform != "win32":
        assert found.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.threat("S2")
async def test_a_name_that_is_public_first_and_private_then_is_asked_for_once(tmp_path: Path) -> None:
    answers, reached = [[OUTSIDE], [INSIDE], [INSIDE]], []

    async def rebinding(host: str, port: int) -> Sequence[str]:
        return answers.pop(0)

    async def handler(request: web.Request) -> web.Response:
        reached.append(request.url.host)
        return web.Response(body=b"ok", content_type="image/png")

    async with serving(handler) as port:
        url = f"http://rebound.example:{port}/"
        await fetch(url, tmp_path, resolve=rebinding)
        assert len(answers) == 2, "one question, and the connection went where its answer said"
        with pytest.raises(AddressRefused):
            await fetch_public(url, tmp_path / "again", limit_bytes=10, resolve=rebinding, public=outside)
    assert reached == ["rebound.example"]


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{inside}/secret",
        "//127.0.0.1:{inside}/secret",
        "http://localhost:{inside}/secret",
        "http://2130706433:{inside}/",
        "http://[::ffff:127.0.0.1]:{inside}/",
        "file:///etc/passwd",
        "gopher://x/",
        "http://user:pw@outside.example/",
    ],
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.threat("S2")
async def test_a_redirect_is_looked_at_like_the_first_address(target: str, status: int, tmp_path: Path) -> None:
    secret_seen = []

    async def secret(request: web.Request) -> web.Response:
        secret_seen.append(request.path)
        return web.Response(body=b"secret", content_type="image/png")

    async with serving(secret, INSIDE) as inside:

        async def redirect(request: web.Request) -> web.Response:
            return web.Response(status=status, headers={"Location": target.format(inside=inside)})

        async with serving(redirect) as port:
            with pytest.raises(AddressRefused):
                await fetch(f"http://outside.example:{port}/", tmp_path)
    assert secret_seen == []
    assert names_in(tmp_path) == []


@pytest.mark.threat("S2")
async def test_a_redirect_by_name_is_resolved_and_looked_at(tmp_path: Path) -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return [INSIDE if host == "inside.example" else OUTSIDE]

    async def redirect(request: web.Request) -> web.Response:
        return web.Response(status=302, headers={"Location": "http://inside.example/"})

    async with serving(redirect) as port:
        with pytest.raises(AddressRefused, match="inside"):
            await fetch(f"http://outside.example:{port}/", tmp_path, resolve=resolve)


@pytest.mark.threat("S2")
async def test_redirects_are_few(tmp_path: Path) -> None:
    async def more(request: web.Request) -> web.Response:
        left = int(request.path.strip("/"))
        if left == 0:
            return web.Response(body=b"here", content_type="image/png")
        return web.Response(status=302, headers={"Location": f"/{left - 1}"})

    async with serving(more) as port:
        assert (await fetch(f"http://a.example:{port}/{MOST_REDIRECTS}", tmp_path)).size == 4
        (tmp_path / "file").unlink()
        with pytest.raises(DownloadFailed, match="redirects"):
            await fetch(f"http://a.example:{port}/{MOST_REDIRECTS + 1}", tmp_path)


@pytest.mark.threat("S2")
async def test_too_much_is_not_read_said_or_not(tmp_path: Path) -> None:
    sent = 0

    async def said(request: web.Request) -> web.Response:
        return web.Response(body=b"x" * 1_001, content_type="image/png")

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        await response.prepare(request)
        with suppress(ConnectionError):
            while sent < 50_000_000:
                await response.write(b"x" * 65_536)
                sent += 65_536
        return response

    for handler in (said, endless):
        async with serving(handler) as port:
            with pytest.raises(InputFileInvalid, match="larger than 1000 bytes"):
                await fetch(f"http://a.example:{port}/", tmp_path)
        assert names_in(tmp_path) == []
    assert sent < 50_000_000


@pytest.mark.threat("S6")
async def test_nothing_is_unpacked(tmp_path: Path) -> None:
    async def packed(request: web.Request) -> web.Response:
        return web.Response(body=b"\x1f\x8b", headers={"Content-Type": "image/png", "Content-Encoding": "gzip"})

    async with serving(packed) as port:
        with pytest.raises(InputFileInvalid, match="packed"):
            await fetch(f"http://a.example:{port}/", tmp_path)


@pytest.mark.threat("S2")
async def test_a_server_that_drips_or_says_nothing_is_left(tmp_path: Path) -> None:
    async def drips(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "image/png"})
        await response.prepare(request)
        for _ in range(10_000):
            await response.write(b"x")
            await asyncio.sleep(5)
        return response

    async def silent(request: web.Request) -> web.Response:
        await asyncio.sleep(10_000)
        return web.Response()

    loop = asyncio.get_running_loop()
    for handler, longest in ((drips, 61), (silent, 61)):
        began = loop.time()
        async with serving(handler) as port:
            with pytest.raises(DownloadFailed):
                await fetch(f"http://a.example:{port}/", tmp_path, timeout=timedelta(seconds=60))
            assert loop.time() - began < longest
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("status", [204, 206, 400, 401, 404, 500])
async def test_what_is_no_file_is_an_error(status: int, tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status)

    async with serving(answer) as port:
        with pytest.raises(DownloadFailed, match=str(status)):
            await fetch(f"http://a.example:{port}/", tmp_path)


async def test_a_web_page_is_no_file(tmp_path: Path) -> None:
    async def page(request: web.Request) -> web.Response:
        return web.Response(text="<html>", content_type="text/html")

    async with serving(page) as port:
        with pytest.raises(InputFileInvalid, match="web page"):
            await fetch(f"http://a.example:{port}/", tmp_path)


@pytest.mark.threat("S18")
async def test_a_proxy_of_the_environment_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    async def proxy(request: web.Request) -> web.Response:
        asked.append(str(request.url))
        return web.Response(body=b"by proxy", content_type="image/png")

    async def picture(request: web.Request) -> web.Response:
        return web.Response(body=b"itself", content_type="image/png")

    async with serving(proxy, INSIDE) as proxy_port, serving(picture) as port:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy_port}")
        found = await fetch(f"http://a.example:{port}/", tmp_path)
    assert found.path.read_bytes() == b"itself"
    assert asked == []


async def test_a_file_that_is_there_is_not_written_over(tmp_path: Path) -> None:
    async def picture(request: web.Request) -> web.Response:
        return web.Response(body=b"new", content_type="image/png")

    (tmp_path / "file").write_bytes(b"mine")
    async with serving(picture) as port:
        with pytest.raises(LocalError):
            await fetch(f"http://a.example:{port}/", tmp_path)
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.threat("S2")
async def test_nobody_learns_what_is_behind_an_address(tmp_path: Path) -> None:
    async def unused(request: web.Request) -> web.Response:
        return web.Response()

    async with serving(unused) as port:
        pass
    with pytest.raises(DownloadFailed) as caught:
        await fetch(f"http://a.example:{port}/path?key=secret", tmp_path)
    assert "secret" not in str(caught.value.as_dict())
    assert OUTSIDE not in str(caught.value.as_dict())
