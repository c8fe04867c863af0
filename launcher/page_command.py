"""
`comfyctl page`: a fresh login address for the page of a service that runs already, for this browser or another.

Where services listen they have written down (`announced`). What answers there must prove that it has our token before
it is sent the token, over the same connection: by now another program may listen at that port.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from contextlib import closing
from datetime import timedelta
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from runcomfy.domain.exceptions import LocalError, foreign_text

if TYPE_CHECKING:
    from launcher.announced import Announced
    from runcomfy.domain.secret import Secret

_TIMEOUT: Final = timedelta(seconds=10)
_LONGEST: Final = 65_536
_START: Final = "start one with comfyctl serve; it prints the page's address"


@click.command()
@click.option("--open", "show", is_flag=True, help="Open it in this computer's browser, too.")
def page(show: bool) -> int:
    """Print a fresh address of the page: it logs in one browser, once, within ten minutes.

    The service must run on this computer, with the same state folder: it is asked with the token that is kept there.
    """
    address = asyncio.run(fresh_address())
    click.echo(address)
    if show:
        click.launch(address)
    return 0


async def fresh_address() -> str:
    """Ask the running service for a login code and return the page's address with it.

    Raises LocalError (there is no service, or what listens in its place is another program), CredentialsMalformed,
    SettingInvalid.
    """
    return await asyncio.to_thread(_fresh_address)


def _fresh_address() -> str:
    from launcher.announced import announced, lives
    from launcher.guarding.kept_secrets import TOKEN_FILE, kept_secret, new_token
    from runcomfy.adapters.config import load_settings

    folder = Path(load_settings().files.state_dir)
    known = announced(folder)
    if not (folder / TOKEN_FILE).is_file() or not known:
        raise LocalError(f"no service listens with this state folder: {folder}", hint=_START)
    living = [service for service in known if lives(service)]
    if not living:
        last = known[0]
        raise LocalError(
            f"the service that listened at {last.address} (process {last.process.pid}) has ended, or runs on another "
            "computer",
            hint=f"{_START}; ask for a page on the computer where the service runs",
        )
    token = kept_secret(folder / TOKEN_FILE, new_token, what="the API's token")
    for service in living[:-1]:
        try:
            return service.address + _login(service, token)
        except LocalError:
            continue
    return living[-1].address + _login(living[-1], token)


def _login(service: Announced, token: Secret) -> str:
    """Return path and query that log in at a service. Raises LocalError."""
    from launcher.guarding.proving import PROOF_PATH, proof_of

    challenge = secrets.token_hex(32)
    try:
        with closing(HTTPConnection(service.host, service.port, timeout=_TIMEOUT.total_seconds())) as http:
            http.connect()
            http.auto_open = 0  # another connection could lead to another program
            _, said = _ask(http, "GET", f"{PROOF_PATH}?challenge={challenge}", {})
            proof = said.get("proof")
            expected = proof_of(token, challenge, service.port)
            if not isinstance(proof, str) or not hmac.compare_digest(proof.encode(), expected.encode()):
                raise LocalError(
                    f"what answers at {service.address} is not our service, or has another token; it was sent nothing",
                    hint="restart comfyctl serve; if the file http_token was removed meanwhile, that makes another one",
                )
            status, said = _ask(http, "POST", "/session/code", {"Authorization": f"Bearer {token.reveal()}"})
    except (OSError, HTTPException) as error:
        raise LocalError(
            f"the service at {service.address} (process {service.process.pid}) does not answer",
            hint="try again in a moment, or restart it",
            details={"error": foreign_text(error)},
        ) from error
    path = said.get("path")
    if status != HTTPStatus.OK or not isinstance(path, str) or not path.startswith("/?code="):
        raise LocalError(f"the service at {service.address} gave no login (HTTP {status})", hint="try again")
    return path


def _ask(http: HTTPConnection, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """Send a request and return status and JSON object of the answer; no object is an empty one."""
    http.request(method, path, headers=headers)
    answer = http.getresponse()
    raw = answer.read(_LONGEST)
    try:
        said = json.loads(raw)
    except ValueError:
        said = None
    return answer.status, said if isinstance(said, dict) else {}
