"""Addresses of a clip: its frames, its caption, and the request of a tuning or of a preview without one."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tuneavideo import api
from tuneavideo.bases import BASES, is_hub_id
from tuneavideo.errors import SettingsError, TuneAVideoError, error_line
from tuneavideo.job_settings import clip_edit_settings
from tuneavideo.jobs.plan import default_frames, visible_devices
from tuneavideo.settings import PRESETS, TuneSettings
from tuneavideo.web.clips import Clip
from tuneavideo.web.pages import estimate, forms
from tuneavideo.web.requests import read_form

if TYPE_CHECKING:
    from tuneavideo.web.app import Page

# Settings beside the sliders; the others are folded away.
MAIN = ("validation_steps", "keep_weights", "lora_rank")


class ClipPages:
    """The addresses below `/clips`."""

    def __init__(self, page: Page) -> None:
        self.page, self.clips = page, page.clips

    def routes(self) -> list[Route]:
        """Return the addresses."""
        return [
            Route("/clips", self.upload, methods=["POST"]),
            Route("/settings", self.load_settings, methods=["POST"]),
            Route("/clips/{clip}", self.show),
            Route("/clips/{clip}/video", self.video),
            Route("/clips/{clip}/frames", self.frames),
            Route("/clips/{clip}/estimate", self.estimate),
            Route("/clips/{clip}/measure", self.measure, methods=["POST"]),
            Route("/clips/{clip}/caption", self.caption, methods=["POST"]),
            Route("/clips/{clip}/delete", self.delete, methods=["POST"]),
            Route("/clips/{clip}/tune", self.tune, methods=["POST"]),
        ]

    def clip(self, request: Request) -> Clip:
        return self.clips.get(request.path_params["clip"])

    async def upload(self, request: Request) -> Response:
        clip = await self.clips.store(request.query_params.get("name", ""), request.stream())
        return JSONResponse({"clip": clip.id, "page": f"/clips/{clip.id}"}, 201)

    async def load_settings(self, request: Request) -> Response:
        """Return the settings in an uploaded clip's comment, as texts of a form's fields."""
        form = await read_form(request)
        facts = await self.clips.facts(self.clips.get(form.get("clip", "")))
        return JSONResponse(forms.loaded(facts["comment"]))

    async def show(self, request: Request) -> Response:
        form = {name: value[:2000] for name, value in request.query_params.items()}
        return await self._shown(self.clip(request), form)

    async def _shown(self, clip: Clip, form: dict[str, str], error: str = "") -> Response:
        facts = await self.clips.facts(clip)
        base, preset = form.get("base", "miniature"), form.get("preset", "default")
        with contextlib.suppress(SettingsError):
            self._check_base(base)
            standard = forms.tune_defaults(base, preset)
            sliders = [forms.slider(TuneSettings, name, standard[name]) for name in [*forms.SLIDERS][:3]]
            return self.page.render(
                "clip.html", 400 if error else 200, clip=clip, facts=facts, form=form, error=error, base=base,
                preset=preset, bases=self._bases(), presets=[*PRESETS], sliders=sliders,
                frames=default_frames(base), memory=forms.field(TuneSettings, "memory", standard["memory"]),
                main=[forms.field(TuneSettings, name, standard[name]) for name in MAIN],
                has_captions=await asyncio.to_thread(lambda: self.page.captioner.is_available),
                groups=forms.groups(TuneSettings, standard, without=["memory", *MAIN, *forms.SLIDERS][: 4 + len(MAIN)]),
            )  # fmt: skip
        raise HTTPException(404, "there is no such base or preset")

    async def video(self, request: Request) -> Response:
        return FileResponse(await self.clips.preview(self.clip(request)), media_type="video/mp4")

    async def frames(self, request: Request) -> Response:
        """Return the frames that would be used, as a picture and their times."""
        clip, form = self.clip(request), dict(request.query_params)
        settings = api.merge_settings({"video": str(clip.path), "prompt": "-", **self._frame_values(form)}, None)
        names = {"start_time", "sample_fps", "stride", "num_frames", "resolution", "fit", "base"}
        return JSONResponse(
            await self.clips.decode("strip", path=str(clip.path), settings=settings.model_dump(include=names))
        )

    async def estimate(self, request: Request) -> Response:
        """Return the estimated time and memory; whether a measurement would give them, and whether it may begin."""
        settings = self._tune_settings(self.clip(request), dict(request.query_params) | {"prompt": "-"})
        found = await asyncio.to_thread(estimate.described, self.page.runs, settings)
        if found["measure"]:
            found["measure"] = await asyncio.to_thread(estimate.is_here, settings.base)
            is_small = settings.base == "miniature" or visible_devices() not in (["cpu"], ["default"])
            found["auto"] = found["measure"] and is_small and not self.page.queue.waiting()
        return JSONResponse(found)

    async def measure(self, request: Request) -> Response:
        """Request a measurement of the form's tuning, unless one waits already."""
        clip, form = self.clip(request), await read_form(request)
        values = self._tune_settings(clip, form | {"prompt": "-"}).model_dump(mode="json", exclude_unset=True)
        waiting = [job for job in self.page.queue.waiting() if job.kind == "measure"]
        job = waiting[0] if waiting else self.page.workers.request("measure", "", values)
        return JSONResponse({"job": job.id}, 202)

    async def caption(self, request: Request) -> Response:
        """Return a caption of the frame in the middle of the chosen part."""
        clip, form = self.clip(request), await read_form(request)
        facts = await self.clips.facts(clip)
        try:
            time = min(max(0.0, float(form.get("time", "") or facts["seconds"] / 2)), facts["seconds"])
        except ValueError:
            raise SettingsError("time: expected seconds") from None
        still = await self.clips.decode("still", path=str(clip.path), time=time)
        return JSONResponse({"caption": await self.page.captioner.describe(still["picture"])})

    async def delete(self, request: Request) -> Response:
        self.clips.delete(self.clip(request))
        return RedirectResponse("/", 303)

    async def tune(self, request: Request) -> Response:
        """Request a tuning; or edits without tuning, as `tuneavideo edit CLIP` makes them."""
        clip, form = self.clip(request), await read_form(request)
        is_preview = bool(form.get("untrained"))
        try:
            settings = self._tune_settings(clip, form)
            values = settings.model_dump(mode="json", exclude_unset=True)
            if is_preview:
                given = {name: value for name, value in values.items() if name not in ("video", "edit")}
                values = given | {
                    "run": values["video"],
                    "source_prompt": values["prompt"],
                    "prompt": values["edit"] or [values["prompt"]],
                }
                clip_edit_settings(values)
        except TuneAVideoError as error:
            return await self._shown(clip, form, error_line(error))
        kind, stem = ("preview", f"{clip.name}-untrained") if is_preview else ("tune", clip.name)
        made = self.page.workers.request(kind, stem, values, is_new=True)
        return RedirectResponse(f"/runs/{quote(made.run)}", 303)

    def _tune_settings(self, clip: Clip, form: dict[str, str]) -> TuneSettings:
        values = self._frame_values(form)
        standard = forms.tune_defaults(values["base"], values["preset"])
        values |= forms.read(TuneSettings, form, standard)
        values |= {
            "video": str(clip.path),
            "prompt": form.get("prompt", ""),
            "edit": forms.prompts(form.get("edit", "")),
        }
        return api.merge_settings(values, None)

    def _frame_values(self, form: dict[str, str]) -> dict[str, Any]:
        """Return base, preset and the choice of frames of a form."""
        base, models = form.get("base", "miniature"), self.page.models
        self._check_base(base)
        values: dict[str, Any] = {"base": str(models / base) if base in self._own_models() and models else base}
        values["preset"] = form.get("preset", "default")
        return values | {name: form[name] for name in forms.FRAMES if form.get(name)}

    def _check_base(self, base: str) -> None:
        """Raise SettingsError for a base that is neither in the table, nor in the folder of models, nor a hub id."""
        known = base in BASES or base in self._own_models()
        if not known and not (is_hub_id(base) and ".." not in base and not Path(base).exists()):
            raise SettingsError(f"base {base[:80]!r}: expected a base of the list, or a hub id such as OWNER/NAME")

    def _own_models(self) -> list[str]:
        found = self.page.models.iterdir() if self.page.models else ()
        return sorted(each.name for each in found if each.is_dir() or each.suffix in (".safetensors", ".ckpt"))

    def _bases(self) -> list[tuple[str, str]]:
        return [(name, base.note) for name, base in BASES.items()] + [
            (name, "your model") for name in self._own_models()
        ]
