"""Addresses of a run: its edits and masks, downloads, exports, and the hub."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tuneavideo import __version__, api
from tuneavideo.errors import RunError, SettingsError, TuneAVideoError, error_line
from tuneavideo.settings import EditSettings
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.web.pages import forms
from tuneavideo.web.requests import read_form

if TYPE_CHECKING:
    from tuneavideo.web.app import Page

FORMATS = ("lora", "diffusers", "official", "mindone", "ldm", "adapter")
# The report has a policy of its own; without its own origin it cannot act on the page.
REPORT_POLICY = "sandbox allow-scripts; frame-ancestors 'none'"


class RunPages:
    """The addresses below `/runs`, and the comparison of runs."""

    def __init__(self, page: Page) -> None:
        self.page, self.runs = page, page.runs

    def routes(self) -> list[Route]:
        """Return the addresses."""
        return [
            Route("/compare", self.compare),
            Route("/runs/{run}", self.show),
            Route("/runs/{run}/files/{path:path}", self.file),
            Route("/runs/{run}/masks", self.upload_mask, methods=["POST"]),
            Route("/runs/{run}/push", self.push, methods=["POST"]),
            Route("/runs/{run}/edits/{edit}/download/{form}", self.download),
            Route("/runs/{run}/edits/{edit}/delete", self.delete_edit, methods=["POST"]),
            Route("/runs/{run}/{action}", self.change, methods=["POST"]),
        ]

    async def show(self, request: Request) -> Response:
        return await self._shown(request.path_params["run"], dict(request.query_params))

    async def _shown(self, name: str, form: dict[str, str], error: str = "") -> Response:
        jobs = self.page.jobs(name)
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
        return self.page.render(
            "run.html", 400 if error else 200, name=name, jobs=jobs, tuning=tuning, error=error, form=form,
            formats=FORMATS, pushed=self.page.pushes.states.get(name), **values,
        )  # fmt: skip

    def _contents(self, run: RunFolder) -> dict[str, Any]:
        settings = run.read_settings()
        standard = settings.model_dump()
        shown, main = [*forms.SLIDERS][1:], ("negative_prompt", "seeds", "fresh_noise", "keep")
        every = forms.defaults(EditSettings, standard)
        return {
            "settings": settings, "edits": self.runs.edits(run), "samples": self.runs.samples(run),
            "listed": self.runs.read(run.path.name), "busy": run.is_in_use, "steps": self.runs.losses(run),
            "scores": run.read_scores(), "source": self.runs.source(run), "weights": run.weight_steps(),
            "masks": self.runs.masks(run),
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
            self.page.workers.request("evaluate", name, {})
        elif action == "export":
            if form.get("to") not in FORMATS:
                raise SettingsError(f"format: expected one of {', '.join(FORMATS)}")
            self.page.workers.request("export", name, {"to": form["to"]})
        elif action == "resume":
            self._resume(run)
        elif action == "delete":
            if any(job["state"] in ("running", "waiting", "stopping") for job in self.page.jobs(name)):
                raise RunError("jobs of this run wait or run; cancel them first")
            await asyncio.to_thread(self.runs.delete, run)
            return RedirectResponse("/", 303)
        else:
            raise HTTPException(404, "there is no such action")
        return RedirectResponse(f"/runs/{quote(name)}", 303)

    def _resume(self, run: RunFolder) -> None:
        """Continue the tuning of a run, with its earlier request if it has one."""
        earlier = [job for job in self.page.queue.all(run.path.name) if job.kind == "tune"]
        if earlier:
            self.page.workers.retry(earlier[0].id)
        else:
            self.page.workers.request("tune", run.path.name, {}, is_new=False)

    async def _edit(self, name: str, form: dict[str, str]) -> Response:
        run = self.runs.open(name)
        try:
            standard = forms.defaults(EditSettings, run.read_settings().model_dump())
            values = forms.read(EditSettings, form, standard) | {"prompt": forms.prompts(form.get("prompt", ""))}
            if not values["prompt"]:
                raise SettingsError("prompt is empty; say in words what the edit shows")
            if form.get("step"):
                values["step"] = form["step"]
            if form.get("mask"):
                values["mask"] = str(self.runs.mask(run, form["mask"]))
            settings = api.edit_settings({**values, "run": str(run.path)})
            if settings.step is not None:
                run.require_model(settings.step)
        except TuneAVideoError as error:
            return await self._shown(name, form, error_line(error))
        self.page.workers.request("edit", name, values)
        return RedirectResponse(f"/runs/{quote(name)}#jobs", 303)

    async def upload_mask(self, request: Request) -> Response:
        run = self.runs.open(request.path_params["run"])
        name = await self.page.clips.store_mask(request.query_params.get("name", ""), request.stream(), run)
        return JSONResponse({"mask": name}, 201)

    async def push(self, request: Request) -> Response:
        """Begin to upload the adapter to the hub."""
        name, form = request.path_params["run"], await read_form(request)
        self.page.pushes.begin(self.runs.open(name), form.get("repository", ""), form.get("token", ""),
                               is_private=form.get("private") == "on")  # fmt: skip
        return RedirectResponse(f"/runs/{quote(name)}#more", 303)

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
        out = self.page.root / ".web" / f"download-{secrets.token_hex(8)}.{form}"
        await self.page.clips.decode("download", path=str(source), out=str(out), form=form, comment=about)
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
        made = await asyncio.to_thread(_report, folders)
        return HTMLResponse(made, headers={"content-security-policy": REPORT_POLICY})


def _report(folders: list[RunFolder]) -> str:
    from tuneavideo import reporting  # slow to import: the first page goes before
    from tuneavideo.reporting.contents import read_run

    return reporting.page([read_run(run, run.path.name) for run in folders])
