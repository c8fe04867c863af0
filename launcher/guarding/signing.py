"""How a webhook is signed (Standard Webhooks, symmetric scheme `v1`), so that its receiver knows who sent it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from pathlib import Path
from typing import Final

from launcher.guarding.kept_secrets import kept_secret
from runcomfy.domain.exceptions import CredentialsMalformed
from runcomfy.domain.secret import Secret

SECRET_FILE: Final = "webhook_secret"  # noqa: S105 - a file's name
_PREFIX: Final = "whsec_"


def webhook_secret(state_dir: str | Path) -> Secret:
    """Return the secret that webhooks are signed with, made now if there is none. Blocks.

    Raises CredentialsMalformed (others can read it, it is no such secret), LocalError, DiskFull.
    """
    path = Path(state_dir) / SECRET_FILE
    secret = kept_secret(path, _new, what="the secret of the webhooks")
    try:
        _key(secret)
    except ValueError:
        raise CredentialsMalformed(
            f"the secret of the webhooks is unreadable: {path}",
            hint="write whsec_ and base64 of 24 to 64 bytes, or remove the file; a new one is made at the next start",
        ) from None
    return secret


def signed(secret: Secret, message_id: str, *, at: int, body: bytes) -> dict[str, str]:
    """Return the headers that a message is sent with. `at`: seconds since the epoch."""
    text = f"{message_id}.{at}.".encode() + body
    signature = base64.b64encode(hmac.new(_key(secret), text, hashlib.sha256).digest()).decode()
    return {"webhook-id": message_id, "webhook-timestamp": str(at), "webhook-signature": f"v1,{signature}"}


def _new() -> str:
    return _PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def _key(secret: Secret) -> bytes:
    text = secret.reveal()
    key = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    if not text.startswith(_PREFIX) or not 24 <= len(key) <= 64:  # as the specification asks
        raise ValueError("no webhook secret")
    return key
