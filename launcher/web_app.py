"""Puts the HTTP API together: the routes, the errors, the guard in front, the page."""

from __future__ import annotations

from fastapi import FastAPI

from launcher.backend import Backend
from launcher.routes import (
    conjure,
    costs,
    events,
    jobs,
    machines,
    metrics,
    page,
    presence,
    queue,
    session,
    uploads,
    workflows,
)

ROUTERS = (
    page.router,
    session.router,
    jobs.router,
    uploads.router,
    events.router,
    machines.router,
    costs.router,
    presence.router,
    queue.router,
    workflows.router,
    metrics.router,
    conjure.router,
)


def create_app(backend: Backend) -> FastAPI:
    """Return the ASGI application over a backend."""
    from launcher.errors import install_errors

    web = FastAPI(title="CONJURE API Server", version="1.0.0", docs_url=None, redoc_url=None)
    web.state.backend = backend
    for router in ROUTERS:
        # `include_router` would build every route a second time, which is most of the time that a start takes.
        web.router.routes.extend(router.routes)
    install_errors(web)
    metrics.install_metrics(web, backend)
    backend.guard.install(web)
    return web
