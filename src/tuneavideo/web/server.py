"""The server of the page."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from tuneavideo.errors import RunError, SettingsError, TuneAVideoError, error_line
from tuneavideo.web.app import Page
from tuneavideo.web.security import LOOPBACK, Guard


def application(
    page: Page, token: str = "", hosts: Sequence[str] = (), *, any_address: bool = False, with_workers: bool = True
) -> Guard:
    """Return the ASGI application of a page."""

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(page.watch_others())]
        if with_workers:
            page.workers.start()
        yield
        for task in tasks:
            task.cancel()
        await page.pushes.stop()
        await page.workers.stop()

    def answer(request: Request, text: str, status: int) -> Response:
        if "application/json" in request.headers.get("accept", ""):
            return JSONResponse({"error": text}, status)
        return page.render("error.html", status, error=text)

    async def on_error(request: Request, error: Exception) -> Response:
        missing = isinstance(error, RunError) and str(error).startswith("there is no")
        return answer(request, error_line(error), 404 if missing else 400)

    async def on_status(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException), "registered for it"
        return answer(request, error.detail, error.status_code)

    async def on_gone(_: Request, __: Exception) -> Response:
        return Response(status_code=400)  # the browser went away while it sent a body

    async def on_fault(request: Request, error: Exception) -> Response:
        return answer(request, error_line(error), 500)

    inner = Starlette(
        routes=page.routes(), lifespan=lifespan,
        exception_handlers={
            TuneAVideoError: on_error, HTTPException: on_status, ClientDisconnect: on_gone, Exception: on_fault,
        },
    )  # fmt: skip
    return Guard(inner, token, {*LOOPBACK, *hosts}, any_address)


def serve(
    root: Path, host: str = "127.0.0.1", port: int = 7860, hosts: Sequence[str] = (), models: Path | None = None,
    captions: str | None = None,
) -> None:  # fmt: skip
    """Serve the page until Ctrl-C; the address is printed. Raises SettingsError when the port is in use."""
    import uvicorn

    is_open = host not in LOOPBACK
    token = secrets.token_urlsafe(24) if is_open or hosts else ""
    everywhere = host in ("0.0.0.0", "::")
    names = [host, *hosts, *([socket.gethostname()] if everywhere else [])]
    page = Page(root, models, captions)
    app = application(page, token, names, any_address=everywhere)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # browsers may connect from here on
    except OSError as error:
        raise SettingsError(f"{host}:{port} cannot be used: {error.strerror}; give another --host or --port") from None
    shown = f"[{host}]" if ":" in host else socket.gethostname() if everywhere else host
    address = f"http://{shown}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
    print(f"{address}\nCtrl-C ends the page; jobs that run stop after the current step and continue at the next start.")
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, http="h11", ws="none",
        h11_max_incomplete_event_size=2**15, limit_concurrency=1000, timeout_keep_alive=10,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    sys.stdout.flush()

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            page.events.close()  # or else open streams would hold up the end
            await super().shutdown(sockets)

    Server(config).run(sockets=[listener])
