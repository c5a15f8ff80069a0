"""Addresses of the page and their answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from tuneavideo import __version__
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.web.captions import Captioner
from tuneavideo.web.clips import Clips
from tuneavideo.web.events import Events, encoded
from tuneavideo.web.hub import Pushes
from tuneavideo.web.pages import forms
from tuneavideo.web.pages.clip import ClipPages
from tuneavideo.web.pages.run import RunPages
from tuneavideo.web.queue import Queue
from tuneavideo.web.queue import Request as Queued
from tuneavideo.web.requests import read_form
from tuneavideo.web.runs import Runs, last_step
from tuneavideo.web.workers import Workers

JOBS = {
    "tune": "Training", "preview": "Preview without training", "edit": "Edits", "evaluate": "Scores",
    "export": "Export", "measure": "Measurement",
}  # fmt: skip
HERE, REPORT = Path(__file__).parent, Path(__file__).parents[1] / "reporting"
STATIC = {
    "page.js": (HERE / "static/page.js", "text/javascript"),
    "run.js": (HERE / "static/run.js", "text/javascript"),
    "clip.js": (HERE / "static/clip.js", "text/javascript"),
    "page.css": (HERE / "static/page.css", "text/css"),
    "player.js": (REPORT / "player.js", "text/javascript"),
    "style.css": (REPORT / "style.css", "text/css"),
}
OTHERS = 2.0  # seconds between two looks at runs that other processes tune


class Page:
    """The page of a root folder.

    Args:
        root: Folder of the runs, which also gets a folder `.web`.
        models: Folder of base models that may be chosen by their paths in it; None without.
        captions: Captioning model, a folder or hub id. None: one of the hub's cache, if there is one.
    """

    def __init__(self, root: Path, models: Path | None = None, captions: str | None = None) -> None:
        self.root, self.models = root.resolve(), models and models.resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self.queue, self.events, self.runs = Queue(self.root), Events(), Runs(self.root)
        self.workers, self.clips = Workers(self.queue, self.events), Clips(self.root)
        self.captioner, self.pushes = Captioner(captions), Pushes(self.events)
        self.templates = Environment(
            loader=ChoiceLoader([FileSystemLoader(HERE / "templates"), FileSystemLoader(REPORT)]),
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self.templates.globals |= {"version": __version__, "quote": quote, "JOBS": JOBS}
        self.templates.filters["shown"] = forms.shown

    def routes(self) -> list[Route]:
        """Return the addresses."""
        return [
            Route("/", self.home),
            Route("/events", self.stream),
            Route("/state", self.state),
            Route("/static/{name}", self.static),
            Route("/queue", self.show_queue),
            Route("/jobs/{job:int}/picture", self.picture),
            Route("/jobs/{job:int}/{action}", self.act, methods=["POST"]),
            *ClipPages(self).routes(),
            *RunPages(self).routes(),
        ]

    def render(self, template: str, status: int = 200, /, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.templates.get_template(template).render(**values), status)

    def jobs(self, run: str | None = None) -> list[dict[str, Any]]:
        """Return the states of the last jobs, newest first."""
        return [
            self.workers.state(each) | {"created": each.created, "words": words_of(each)}
            for each in self.queue.all(run)
        ]

    async def home(self, request: Request) -> Response:
        words = request.query_params.get("q", "")[:200]
        runs = await asyncio.to_thread(self.runs.listed, words)
        open_jobs = {job["run"]: job for job in reversed(self.jobs()) if job["state"] != "done" and job["run"]}
        return self.render(
            "home.html", runs=runs, words=words, jobs=open_jobs, bundled=[*self.clips.bundled.values()],
            uploaded=self.clips.uploaded(),
        )  # fmt: skip

    async def stream(self, _: Request) -> Response:
        # with those that are done: they may have ended since the browser got its page
        first = "".join(encoded("job", job) for job in reversed(self.jobs()))
        return StreamingResponse(self.events.stream(first), media_type="text/event-stream")

    async def state(self, _: Request) -> Response:
        return JSONResponse({"jobs": self.jobs(), "runs": await asyncio.to_thread(self.runs.names)})

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404, "there is no such file")
        path, kind = STATIC[name]
        return FileResponse(path, media_type=kind, headers={"cache-control": "no-cache"})

    async def show_queue(self, _: Request) -> Response:
        return self.render("queue.html", jobs=self.jobs())

    async def picture(self, request: Request) -> Response:
        """Return the picture of the edits that a job makes."""
        path = self.queue.picture(request.path_params["job"])
        if not path.is_file():
            raise HTTPException(404, "there is no picture of this job")
        return Response(await asyncio.to_thread(path.read_bytes), media_type="image/jpeg")

    async def act(self, request: Request) -> Response:
        number, action = request.path_params["job"], request.path_params["action"]
        form = await read_form(request)
        if action == "cancel":
            done = await self.workers.cancel(number)
        elif action == "pause":
            done = self.workers.pause(number)
        elif action == "retry":
            done = self.workers.retry(number)
        else:
            raise HTTPException(404, "there is no such action")
        back = "/queue" if form.get("back") == "queue" or not done.run else f"/runs/{quote(done.run)}"
        return RedirectResponse(back, 303)

    async def watch_others(self) -> None:
        """Publish the progress of runs that other processes tune."""
        while True:
            await asyncio.sleep(OTHERS)
            if self.events.has_listeners:
                for message in await asyncio.to_thread(self._others):
                    self.events.publish("other", message)

    def _others(self) -> list[dict[str, Any]]:
        own = {message.get("run") for message in self.workers.running.values()}
        busy = [listed for listed in self.runs.listed()[:20] if listed.name not in own]
        found = []
        for listed in busy:
            run = RunFolder(self.root / listed.name)
            step = last_step(run) if run.is_in_use else None
            if step:
                found.append(
                    {"run": listed.name, "number": step["number"], "total": listed.total, "loss": step["loss"]}
                )
        return found


def words_of(request: Queued) -> str:
    """Return in a few words what a job makes: its caption, its prompts or its format."""
    values = request.settings
    if request.kind in ("edit", "preview"):
        return " · ".join(values.get("prompt", ()))[:300]
    return str(values.get("to" if request.kind == "export" else "prompt", ""))[:300] if request.run else ""
