"""`POST /uploads`: a file for jobs to come, read whole and judged before the answer."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from launcher.backend import Backend, backend_of
from launcher.errors import NotSupported
from launcher.intake import MULTIPART, uploads_of
from launcher.multipart import read_form
from launcher.plain_json import PlainJson
from launcher.schemas import Upload, answers
from launcher.upload_store import Incoming
from runcomfy.domain.exceptions import BadInput

router = APIRouter(prefix="/uploads", tags=["uploads"])

Serves = Annotated[Backend, Depends(backend_of)]
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "string", "format": "binary"}},
                    "required": ["file"],
                    "additionalProperties": False,
                }
            }
        },
    }
}


@router.post("", status_code=201, response_model=None, openapi_extra=_BODY, responses=answers(201, Upload, 411, 507))
async def upload(request: Request, backend: Serves) -> PlainJson:
    """Keep a file, and say by what name jobs may ask for it. What no job uses is removed after a day."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != MULTIPART:
        raise NotSupported("a file is sent as multipart/form-data", hint="in a part with the name file")
    store = uploads_of(backend.app)

    async def open_sink(_: str, file_name: str) -> Incoming:
        return await store.open(file_name)

    form = await read_form(request, open_sink, field_most=1024)
    files = [sink for name, sink in form.files if name == "file"]
    if len(form.files) != 1 or len(files) != 1 or form.fields or not isinstance(files[0], Incoming):
        await form.abort()
        raise BadInput("one file is expected, in a part with the name file", hint="send others one by one")
    return PlainJson((await files[0].keep()).as_dict(), 201, headers={"Cache-Control": "no-store"})
