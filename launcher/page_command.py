"""`comfyctl page`: a fresh login address for the page of a service that runs already, for this browser or another."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import click

from runcomfy.domain.exceptions import LocalError, foreign_text

_TIMEOUT: Final = timedelta(seconds=10)


@click.command()
@click.option("--host", metavar="NAME", help="Where the service listens (default: as the settings say).")
@click.option("--port", type=click.IntRange(1, 65_535), help="At which port (default: as the settings say).")
@click.option("--open", "show", is_flag=True, help="Open it in this computer's browser, too.")
def page(host: str | None, port: int | None, show: bool) -> int:
    """Print a fresh address of the page: it logs in one browser, once, within ten minutes.

    The service must run with the same state folder: it is asked with the token that is kept there.
    """
    address = asyncio.run(fresh_address(host, port))
    click.echo(address)
    if show:
        click.launch(address)
    return 0


async def fresh_address(host: str | None = None, port: int | None = None) -> str:
    """Ask the running service for a login code and return the page's address with it.

    Raises LocalError (there is no service, or it is another one), CredentialsMalformed, SettingInvalid.
    """
    from launcher.guarding.kept_secrets import TOKEN_FILE, kept_secret, new_token
    from runcomfy.adapters.config import load_settings

    settings = await asyncio.to_thread(load_settings)
    file = Path(settings.files.state_dir) / TOKEN_FILE
    if not await asyncio.to_thread(file.is_file):
        raise LocalError(
            f"no service has run with this state folder: {file.parent}",
            hint="start one with comfyctl serve; it prints the page's address",
        )
    token = await asyncio.to_thread(kept_secret, file, new_token, what="the API's token")
    shown = host or {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.http.host, settings.http.host)  # noqa: S104
    at = f"http://{f'[{shown}]' if ':' in shown else shown}:{settings.http.port if port is None else port}"
    return at + await _path(at, token.reveal())


async def _path(address: str, token: str) -> str:
    import aiohttp

    headers = {"Authorization": f"Bearer {token}"}
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT.total_seconds())
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as http,
            http.post(f"{address}/session/code", allow_redirects=False) as answer,
        ):
            status = answer.status
            said: Any = await answer.json() if status == HTTPStatus.OK else None
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise LocalError(
            f"no service answers at {address}",
            hint="start it with comfyctl serve, or say where it is: --host, --port",
            details={"error": foreign_text(error)},
        ) from error
    path = said.get("path") if isinstance(said, dict) else None
    if not isinstance(path, str) or not path.startswith("/?code="):
        raise LocalError(
            f"what answers at {address} does not know our token (HTTP {status})",
            hint="it runs with another state folder (RUNCOMFY_STATE_DIR), or is another program: see --port",
        )
    return path
