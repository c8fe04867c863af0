"""
Proves to whoever has the token that this server has it too, without the token being said.

A program that is to send the token asks first: another program may listen at the port by now. The port is part of what
is proved, so that nobody can pass a question on to the real server at another one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Final
from urllib.parse import parse_qs

from runcomfy.domain.secret import Secret

PROOF_PATH: Final = "/session/proof"
_CHALLENGE: Final = re.compile(r"[0-9a-f]{64}")


def proof_of(token: Secret, challenge: str, port: int) -> str:
    """Return what only a server at this port that has the token can answer to a challenge."""
    words = f"runcomfy-http-proof\n{port}\n{challenge}"
    return hmac.new(token.reveal().encode(), words.encode(), hashlib.sha256).hexdigest()


def challenge_in(query: bytes) -> str | None:
    """Return the challenge of a request's address; None: it holds none that is one."""
    try:
        found = parse_qs(query.decode("latin-1"), max_num_fields=4).get("challenge", [])
    except ValueError:
        return None
    return found[0] if len(found) == 1 and _CHALLENGE.fullmatch(found[0]) else None
