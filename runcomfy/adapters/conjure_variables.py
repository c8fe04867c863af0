"""
The variables of the generation services and of the API server, some of them CONJURE's own.

They count from the environment only: who starts `uvicorn` or CONJURE's programs says there what they are to do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from runcomfy.adapters.setting_kinds import TOKEN, Kind, Variable, refuse, shown, text_of
from runcomfy.domain.settings import GENERATION_MODES, LOCAL_BACKENDS, SERVED


def _one_of(words: tuple[str, ...]) -> Kind:
    return text_of("word", f"write {', '.join(words[:-1])} or {words[-1]}", _check(words), place=True)


def _check(words: tuple[str, ...]) -> Callable[[object], str]:
    def check(value: object) -> str:
        word = str(value).strip().lower()
        if word not in words:
            raise refuse(f"{shown(value)} is none of {', '.join(words)}")
        return word

    return check


CONJURE_VARIABLES: Final = (
    Variable(
        "RUNCOMFY_SERVE",
        _one_of(SERVED),
        "app.serves",
        "What `launcher/api_server.py` works on beside HTTP: the queue over rented machines, the queue on your own "
        "ComfyUI, or nothing. Not set: pool if there is an account, else none.",
    ),
    Variable(
        "CONJURE_GENERATION_MODE",
        _one_of(GENERATION_MODES),
        "app.generation_mode",
        "The generation mode of CONJURE's endpoints where the state file names none.",
    ),
    Variable(
        "CONJURE_LOCAL_BACKEND",
        _one_of(LOCAL_BACKENDS),
        "app.local_backend",
        "What the generation mode `local` runs on: your own ComfyUI, or Hugging Face Spaces.",
    ),
    Variable(
        "HUGGINGFACE_HUB_ACCESS_TOKEN",
        Kind(TOKEN.annotation, "token", "copy it from Hugging Face's settings", secret=True, place=True),
        "app.hugging_face_token",
        "The token that Hugging Face Spaces are called with.",
    ),
)
