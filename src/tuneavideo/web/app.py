"""Addresses of the page and their answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from tuneavideo import __version__, api, reporting
from tuneavideo.bases import BASES, is_hub_id
from tuneavideo.errors import RunError, SettingsError, TuneAVideoError, error_line
from tuneavideo.jobs.plan import default_frames
from tuneavideo.reporting.contents import read_run
from tuneavideo.settings import PRESETS, EditSettings, TuneSettings
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.web import estimate, forms
from tuneavideo.web.clips import Clip, Clips
from tuneavideo.web.events import Events, encoded
from tuneavideo.web.queue import Queue
from tuneavideo.web.runs import Runs, is_untrained, last_step
from tuneavideo.web.workers import Workers

HERE, REPORT = Path(__file__).parent, Path(reporting.__file__).parent
STATIC = {
    "page.js": (HERE / "static/page.js", "text/javascript"),
    "clip.js": (HERE / "static/clip.js", "text/javascript"),
    "page.css": (HERE / "static/page.css", "text/css"),
    "player.js": (REPORT / "player.js", "text/javascript"),
    "style.css": (REPORT / "style.css", "text/css"),
}
FORMATS = ("lora", "diffusers", "official", "mindone", "ldm", "adapter")
# The report has a policy of its own; without its own origin it cannot act on the page.
REPORT_POLICY = "sandbox allow-scripts; frame-ancestors 'none'"
OTHERS = 2.0  # seconds between two looks at runs that other processes tune


class Page:
    """The page of a root folder.

    Args:
        root: Folder of the runs, which also gets a folder `.web`.
        models: Folder of base models that may be chosen by their paths in it; None without.
    """

    def __init__(self, root: Path, models: Path | None = None) -> None:
        self.root, self.models = root.resolve(), models and models.resolve()
        self.root.mkdir(parents=True, exist_ok=True)
        self.queue, self.events, self.runs = Queue(self.root), Events(), Runs(self.root)
        self.workers, self.clips = Workers(self.queue, self.events), Clips(self.root)
        self.templates = Environment(
            loader=ChoiceLoader([FileSystemLoader(HERE / "templates"), FileSystemLoader(REPORT)]),
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self.templates.globals |= {"version": __version__, "quote": quote}
        self.templates.filters["shown"] = forms.shown

    def routes(self) -> list[Route]:
        """Return the addresses."""
        return [
            Route("/", self.home),
            Route("/events", self.stream),
            Route("/state", self.state),
            Route("/static/{name}", self.static),
            Route("/clips", self.upload, methods=["POST"]),
            Route("/settings", self.load_settings, methods=["POST"]),
            Route("/clips/{clip}", self.clip),
            Route("/clips/{clip}/video", self.clip_video),
            Route("/clips/{clip}/frames", self.clip_frames),
            Route("/clips/{clip}/estimate", self.clip_estimate),
            Route("/clips/{clip}/delete", self.delete_clip, methods=["POST"]),
            Route("/clips/{clip}/tune", self.tune, methods=["POST"]),
            Route("/queue", self.show_queue),
            Route("/jobs/{job:int}/{action}", self.act, methods=["POST"]),
            Route("/compare", self.compare),
            Route("/runs/{run}", self.run),
            Route("/runs/{run}/files/{path:path}", self.file),
            Route("/runs/{run}/edits/{edit}/download/{form}", self.download),
            Route("/runs/{run}/edits/{edit}/delete", self.delete_edit, methods=["POST"]),
            Route("/runs/{run}/{action}", self.change, methods=["POST"]),
        ]

    def render(self, template: str, status: int = 200, /, **values: Any) -> HTMLResponse:
        return HTMLResponse(self.templates.get_template(template).render(**values), status)

    def jobs(self, run: str | None = None) -> list[dict[str, Any]]:
        """Return the states of the last jobs, newest first."""
        return [self.workers.state(each) | {"created": each.created} for each in self.queue.all(run)]

    async def home(self, request: Request) -> Response:
        words = request.query_params.get("q", "")[:200]
        runs = await asyncio.to_thread(self.runs.listed, words)
        open_jobs = {job["run"]: job for job in reversed(self.jobs()) if job["state"] != "done"}
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

    async def upload(self, request: Request) -> Response:
        clip = await self.clips.store(request.query_params.get("name", ""), request.stream())
        return JSONResponse({"clip": clip.id, "page": f"/clips/{clip.id}"}, 201)

    async def load_settings(self, request: Request) -> Response:
        """Return the settings in an uploaded clip's comment, as texts of a form's fields."""
        form = await read_form(request)
        facts = await self.clips.facts(self.clips.get(form.get("clip", "")))
        return JSONResponse(forms.loaded(facts["comment"]))

    async def clip(self, request: Request) -> Response:
        clip, query = self.clips.get(request.path_params["clip"]), request.query_params
        form = {name: value[:2000] for name, value in query.items()}
        return await self._clip_page(clip, form)

    async def _clip_page(self, clip: Clip, form: dict[str, str], error: str = "") -> Response:
        facts = await self.clips.facts(clip)
        base, preset = form.get("base", "miniature"), form.get("preset", "default")
        with contextlib.suppress(SettingsError):
            self._check_base(base)
            standard = forms.tune_defaults(base, preset)
            sliders = [forms.slider(TuneSettings, name, standard[name]) for name in [*forms.SLIDERS][:3]]
            return self.render(
                "clip.html", 400 if error else 200, clip=clip, facts=facts, form=form, error=error, base=base,
                preset=preset, bases=self._bases(), presets=[*PRESETS], sliders=sliders,
                frames=default_frames(base), memory=forms.field(TuneSettings, "memory", standard["memory"]),
                groups=forms.groups(TuneSettings, standard, without=["memory", *forms.SLIDERS][:4]),
            )  # fmt: skip
        raise HTTPException(404, "there is no such base or preset")

    async def clip_video(self, request: Request) -> Response:
        clip = self.clips.get(request.path_params["clip"])
        return FileResponse(await self.clips.preview(clip), media_type="video/mp4")

    async def clip_frames(self, request: Request) -> Response:
        """Return the frames that would be used, as a picture and their times."""
        clip, form = self.clips.get(request.path_params["clip"]), dict(request.query_params)
        chosen = self._frame_values(form)
        settings = api.merge_settings({"video": str(clip.path), "prompt": "-", **chosen}, None)
        names = {"start_time", "sample_fps", "stride", "num_frames", "resolution", "fit", "base"}
        return JSONResponse(
            await self.clips.decode("strip", path=str(clip.path), settings=settings.model_dump(include=names))
        )

    async def clip_estimate(self, request: Request) -> Response:
        clip, form = self.clips.get(request.path_params["clip"]), dict(request.query_params)
        settings = self._tune_settings(clip, form | {"prompt": "-"})
        return JSONResponse({"estimate": await asyncio.to_thread(estimate.described, self.runs, settings)})

    async def delete_clip(self, request: Request) -> Response:
        self.clips.delete(self.clips.get(request.path_params["clip"]))
        return RedirectResponse("/", 303)

    async def tune(self, request: Request) -> Response:
        clip, form = self.clips.get(request.path_params["clip"]), await read_form(request)
        try:
            settings = self._tune_settings(clip, form)
        except TuneAVideoError as error:
            return await self._clip_page(clip, form, error_line(error))
        stem = f"{clip.name}-untrained" if is_untrained(settings.max_train_steps) else clip.name
        values = settings.model_dump(mode="json", exclude_unset=True)
        made = self.workers.request("tune", stem, values, is_new=True)
        return RedirectResponse(f"/runs/{quote(made.run)}", 303)

    def _tune_settings(self, clip: Clip, form: dict[str, str]) -> TuneSettings:
        values = self._frame_values(form)
        standard = forms.tune_defaults(values["base"], values["preset"])
        values |= forms.read(TuneSettings, form, standard)
        if form.get("untrained"):  # a step of almost no length leaves the model as it is
            values |= {"max_train_steps": 1, "learning_rate": 1e-12}
        values |= {
            "video": str(clip.path),
            "prompt": form.get("prompt", ""),
            "edit": forms.prompts(form.get("edit", "")),
        }
        return api.merge_settings(values, None)

    def _frame_values(self, form: dict[str, str]) -> dict[str, Any]:
        """Return base, preset and the choice of frames of a form."""
        base = form.get("base", "miniature")
        self._check_base(base)
        values: dict[str, Any] = {
            "base": str(self.models / base) if base in self._own_models() and self.models else base
        }
        values["preset"] = form.get("preset", "default")
        return values | {name: form[name] for name in forms.FRAMES if form.get(name)}

    def _check_base(self, base: str) -> None:
        """Raise SettingsError for a base that is neither in the table, nor in the folder of models, nor a hub id."""
        known = base in BASES or base in self._own_models()
        if not known and not (is_hub_id(base) and ".." not in base and not Path(base).exists()):
            raise SettingsError(f"base {base[:80]!r}: expected a base of the list, or a hub id such as OWNER/NAME")

    def _own_models(self) -> list[str]:
        found = self.models.iterdir() if self.models else ()
        return sorted(each.name for each in found if each.is_dir() or each.suffix in (".safetensors", ".ckpt"))

    def _bases(self) -> list[tuple[str, str]]:
        return [(name, base.note) for name, base in BASES.items()] + [
            (name, "your model") for name in self._own_models()
        ]

    async def show_queue(self, _: Request) -> Response:
        return self.render("queue.html", jobs=self.jobs())

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
        back = "/queue" if form.get("back") == "queue" else f"/runs/{quote(done.run)}"
        return RedirectResponse(back, 303)

    async def run(self, request: Request) -> Response:
        return await self._run_page(request.path_params["run"], dict(request.query_params))

    async def _run_page(self, name: str, form: dict[str, str], error: str = "") -> Response:
        jobs = self.jobs(name)
        try:
            run: RunFolder | None = self.runs.open(name)
        except RunError:
            if not jobs:
                raise
            run = None
        values: dict[str, Any] = {"settings": None, "edits": [], "samples": {}, "listed": None, "source": None}
        if run:
            values = await asyncio.to_thread(self._contents, run)
        tuning = next((job for job in jobs if job["kind"] == "tune"), None)
        return self.render(
            "run.html", 400 if error else 200, name=name, jobs=jobs, tuning=tuning, error=error, form=form,
            formats=FORMATS, **values,
        )  # fmt: skip

    def _contents(self, run: RunFolder) -> dict[str, Any]:
        settings = run.read_settings()
        standard = settings.model_dump()
        shown, main = [*forms.SLIDERS][1:], ("negative_prompt", "seeds", "fresh_noise")
        every = forms.defaults(EditSettings, standard)
        return {
            "settings": settings, "edits": self.runs.edits(run), "samples": self.runs.samples(run),
            "listed": self.runs.read(run.path.name), "busy": run.is_in_use, "steps": self.runs.losses(run),
            "scores": run.read_scores(), "source": self.runs.source(run),
            "exports": sorted(path.name for path in (run.path / "exports").glob("[!.]*")),
            "sliders": [forms.slider(EditSettings, name, every[name]) for name in shown],
            "main": [forms.field(EditSettings, name, every[name]) for name in main],
            "groups": forms.groups(EditSettings, every, without=(*shown, *main)),
        }  # fmt: skip

    async def change(self, request: Request) -> Response:
        name, action = request.path_params["run"], request.path_params["action"]
        form = await read_form(request)
        if action == "edit":
            return await self._edit(name, form)
        run = self.runs.open(name)
        if action == "evaluate":
            self.workers.request("evaluate", name, {})
        elif action == "export":
            if form.get("to") not in FORMATS:
                raise SettingsError(f"format: expected one of {', '.join(FORMATS)}")
            self.workers.request("export", name, {"to": form["to"]})
        elif action == "resume":
            self._resume(run)
        elif action == "delete":
            if any(job["state"] in ("running", "waiting", "stopping") for job in self.jobs(name)):
                raise RunError("jobs of this run wait or run; cancel them first")
            await asyncio.to_thread(self.runs.delete, run)
            return RedirectResponse("/", 303)
        else:
            raise HTTPException(404, "there is no such action")
        return RedirectResponse(f"/runs/{quote(name)}", 303)

    def _resume(self, run: RunFolder) -> None:
        """Continue the tuning of a run, with its earlier request if it has one."""
        earlier = [job for job in self.queue.all(run.path.name) if job.kind == "tune"]
        if earlier:
            self.workers.retry(earlier[0].id)
        else:
            self.workers.request("tune", run.path.name, {}, is_new=False)

    async def _edit(self, name: str, form: dict[str, str]) -> Response:
        run = self.runs.open(name)
        try:
            standard = forms.defaults(EditSettings, run.read_settings().model_dump())
            values = forms.read(EditSettings, form, standard) | {"prompt": forms.prompts(form.get("prompt", ""))}
            if not values["prompt"]:
                raise SettingsError("prompt is empty; say in words what the edit shows")
            api.edit_settings({**values, "run": str(run.path)})
        except TuneAVideoError as error:
            return await self._run_page(name, form, error_line(error))
        self.workers.request("edit", name, values)
        return RedirectResponse(f"/runs/{quote(name)}#jobs", 303)

    async def delete_edit(self, request: Request) -> Response:
        name = request.path_params["run"]
        await asyncio.to_thread(self.runs.delete_edit, self.runs.open(name), request.path_params["edit"])
        return RedirectResponse(f"/runs/{quote(name)}#edits", 303)

    async def file(self, request: Request) -> Response:
        path = self.runs.file(request.path_params["run"], request.path_params["path"])
        headers = (
            {"content-disposition": f'attachment; filename="{path.name}"'} if path.suffix == ".safetensors" else {}
        )
        return FileResponse(path, headers=headers)

    async def download(self, request: Request) -> Response:
        name, form = request.path_params["run"], request.path_params["form"]
        run = self.runs.open(name)
        edit = self.runs.edit(run, request.path_params["edit"])
        if form not in ("mp4", "gif", "zip"):
            raise HTTPException(404, "there is no such format")
        own, made = run.read_settings(), run.read_edit(edit)
        about = json.dumps({"tuneavideo": made | {"version": __version__, "base": own.base, "caption": own.prompt}})
        source = edit / "edit.mp4"
        if not source.is_file() or source.is_symlink():
            raise RunError("the edit has no mp4")
        out = self.root / ".web" / f"download-{secrets.token_hex(8)}.{form}"
        await self.clips.decode("download", path=str(source), out=str(out), form=form, comment=about)
        kind = {"mp4": "video/mp4", "gif": "image/gif", "zip": "application/zip"}[form]
        contents = await asyncio.to_thread(out.read_bytes)
        out.unlink()
        headers = {"content-disposition": f"attachment; filename*=utf-8''{quote(name)}-{quote(edit.name)}.{form}"}
        return Response(contents, media_type=kind, headers=headers)

    async def compare(self, request: Request) -> Response:
        names = request.query_params.getlist("run")[:6]
        folders = [self.runs.open(name) for name in names]
        if not folders:
            raise RunError("choose one or more runs to compare")
        made = await asyncio.to_thread(lambda: reporting.page([read_run(run, run.path.name) for run in folders]))
        return HTMLResponse(made, headers={"content-security-policy": REPORT_POLICY})

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


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form; of a repeated field the last."""
    body = await request.body()
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=200)
    except ValueError:
        raise HTTPException(400, "the form cannot be read") from None
    return {name: value.replace("\0", "") for name, value in pairs}
