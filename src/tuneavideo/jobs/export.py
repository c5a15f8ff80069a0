"""Files of an edit, and the model card of a run."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import version
from pathlib import Path

from tuneavideo import video as videos
from tuneavideo.jobs.session import EditSession
from tuneavideo.settings import EditSettings, TuneSettings
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.version import __version__
from tuneavideo.video import AnyVideo
from tuneavideo.video.montage import side_by_side

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "av")


def write_edit(
    session: EditSession, settings: EditSettings, prompt: str, seed: int, video: AnyVideo, number: int | None = None
) -> Path:
    """Write the files of an edit into a new folder, by default with the next free number, and return the folder."""
    with session.run.new_edit(prompt, number) as (draft, folder):
        for kind in settings.formats:
            videos.write(video, draft / ("frames" if kind == "frames" else f"edit.{kind}"))
        source = dataclasses.replace(session.source, fps=video.fps, sound_SC=video.sound_SC)
        labels = [session.run.read_settings().prompt, prompt]
        videos.write(side_by_side([source, video], labels=labels), draft / "side-by-side.mp4")
        made = settings.model_dump(mode="json", exclude={"prompt", "seeds", "run"})
        made |= {"tuned_steps": session.step or session.run.tuned_steps}
        atomic.write(draft / "edit.json", json.dumps({"prompt": prompt, "seed": seed} | made, indent=1))
    return folder


def versions() -> dict[str, str]:
    return {"tuneavideo": __version__} | {package: version(package) for package in PACKAGES}


def model_card(settings: TuneSettings, run: RunFolder) -> str:
    """Return the model card of a run, in Markdown."""
    return f"""---
base_model: {settings.base}
library_name: tuneavideo
tags: [tune-a-video, video-editing, one-shot-tuning]
---
# {run.path.name}

A [Tune-A-Video](https://arxiv.org/abs/2212.11565) adapter: the motion of one clip
("{settings.prompt}", `source.mp4`), learned by `{settings.base}` in {settings.max_train_steps} steps
with the preset `{settings.preset}`. The base itself is not in here.

    tuneavideo edit {run.path} --prompt "a new prompt"

All settings and versions are in `settings.yaml`, the loss of every step in `steps.jsonl`.
"""
