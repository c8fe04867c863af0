"""Who is logged in, logging out, and fresh codes for the page's address."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from pydantic import BaseModel, Field

from launcher.backend import Backend, backend_of
from launcher.guarding.middleware import head_of
from launcher.guarding.sessions import CODE_LIFE
from launcher.schemas import problems

router = APIRouter(prefix="/session", tags=["session"])


class SessionView(BaseModel):
    """Who sent the request."""

    kind: str = Field(description="token, or session (the page)")
    name: str = Field(description="what its jobs are counted under")
    csrf: None = Field(default=None, description="none is needed: the session's cookie is SameSite=Strict")
    version: str = Field(description="of this program")


class CodeView(BaseModel):
    """A login for the page."""

    code: str = Field(description="for the address /?code=…; works once")
    path: str
    expires_in_s: float


@router.get("", responses=problems())
async def session(request: Request, backend: Annotated[Backend, Depends(backend_of)]) -> SessionView:
    """Say who the client is."""
    principal = backend.guard.principal_of(request)
    return SessionView(kind=principal.kind, name=principal.name, version=version("runcomfy-orchestrator"))


@router.post("/logout", status_code=204, responses=problems())
async def log_out(request: Request, backend: Annotated[Backend, Depends(backend_of)]) -> Response:
    """End the session."""
    return Response(status_code=204, headers={"Set-Cookie": backend.guard.log_out(head_of(request.scope))})


@router.post("/code", responses=problems())
async def new_code(request: Request, backend: Annotated[Backend, Depends(backend_of)]) -> CodeView:
    """Return a fresh one-time code for the page's address; only for the token."""
    if backend.guard.principal_of(request).kind != "token":
        raise HTTPException(403, "a session cannot make others; send the token")
    code = backend.guard.new_code()
    return CodeView(code=code, path=f"/?code={code}", expires_in_s=CODE_LIFE.total_seconds())
