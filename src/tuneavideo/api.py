"""Functions with paths in and paths out; the only module that doors (command line, page, batch) import.

Each job is a generator of `Progress`, so that every door shows it in its own way and cancels by closing it; `tune`,
`edit` and `invert` run such a generator to its end. torch is imported when a job starts, not before.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tuneavideo import miniature
from tuneavideo.bases import BASES
from tuneavideo.errors import SettingsError
from tuneavideo.progress import Job, Progress
from tuneavideo.runs import RunFolder
from tuneavideo.settings import EditSettings, Sampling, TuneSettings, checked, layers, read_yaml

RESUMED_ANEW = {"edit", "max_train_steps", "learning_rate", "mixed_precision"} | {
    "checkpointing_steps", "checkpoints_total_limit", "validation_steps", "report_to",
}  # fmt: skip

Listener = Callable[[Progress], None]


def tune(
    video: str | Path,
    prompt: str,
    *,
    edit: str | Iterable[str] = (),
    out: str | Path | None = None,
    config: str | Path | None = None,
    progress: Listener | None = None,
    **settings: Any,
) -> Path:
    """Teach a text-to-image model the motion of one clip, and edit the clip.

    Args:
        video: Clip to learn from: a video file, a GIF or a folder of images.
        prompt: What the clip shows, in words.
        edit: New prompts to edit the clip with when it is tuned.
        out: Run folder to make; by default the next free `runs/<clip>-<n>`.
        config: YAML file of further settings.
        progress: Called with a `Progress` after every step.
        **settings: Any field of `TuneSettings`, such as `base`, `preset`, `max_train_steps`, `learning_rate`.

    Returns:
        The run folder; the adapter is in its `adapter/`, the edits are in its `edits/`.

    Raises:
        TuneAVideoError: Something the user can put right; nothing is left half-written.
    """
    stated = {"video": str(video), "prompt": prompt, "edit": _listed(edit), **settings}
    done = _listened(tuning(tune_settings(stated, config), out=out), progress)
    return next(each.path for each in done if each.path)


def resume(run: str | Path, *, progress: Listener | None = None, **settings: Any) -> Path:
    """Go on with a tuning that was stopped, to the result of an unbroken one.

    Args:
        run: Its run folder.
        progress: Called with a `Progress` after every step.
        **settings: Only `edit`, `max_train_steps`, `learning_rate`, `mixed_precision`, what is kept on the way and how
            edits are made may differ from the run's own.
    """
    done = _listened(tuning(resumed_settings(run, settings), resume=run), progress)
    return next(each.path for each in done if each.path)


def edit(
    run: str | Path,
    prompts: str | Iterable[str],
    *,
    config: str | Path | None = None,
    progress: Listener | None = None,
    **settings: Any,
) -> list[Path]:
    """Make new videos with the motion of a tuned clip, one per prompt and seed.

    Args:
        run: Run folder of the tuned clip.
        prompts: What the edits should show.
        config: YAML file of settings.
        progress: Called with a `Progress` after every step.
        **settings: Any field of `Sampling`, such as `guidance_scale` or `strength`; the others are the run's own.

    Returns:
        The folder of each edit, with `edit.mp4`, `side-by-side.mp4` and `edit.json`.
    """
    stated = {"run": str(run), "prompt": _listed(prompts), **settings}
    done = _listened(editing(edit_settings(stated, config)), progress)
    return [each.path for each in done if each.stage == "edit" and each.path]


def invert(run: str | Path, *, progress: Listener | None = None, **settings: Any) -> Path:
    """Find the noise a tuned clip came from, and keep it in the run folder for edits to start from.

    Returns:
        The safetensors file that holds `latents`, `1 C T H W`.
    """
    stated = {"run": str(run), "prompt": ("-",), **settings}
    done = _listened(inverting(edit_settings(stated)), progress)
    return next(each.path for each in reversed(done) if each.path)


def tune_settings(stated: Mapping[str, Any], config: str | Path | None = None) -> TuneSettings:
    """Settings of a tuning: what is stated, over the YAML file, the preset, the base and the built-in values."""
    from_file = read_yaml(config, TuneSettings) if config else {}
    merged = layers(stated, from_file)
    for name in {"video", "base"} & merged.keys():  # a run folder is to be understood from anywhere
        if merged[name] not in BASES and os.path.exists(merged[name]):
            merged[name] = os.path.abspath(merged[name])
    return checked(TuneSettings, merged, str(config or "settings"))


def edit_settings(stated: Mapping[str, Any], config: str | Path | None = None) -> EditSettings:
    """Settings of an edit: what is stated, over the YAML file and the run's own values."""
    own = RunFolder.open(stated["run"]).read_settings().model_dump(include=set(Sampling.model_fields))
    from_file = read_yaml(config, EditSettings) if config else {}
    return checked(EditSettings, {**own, **from_file, **stated}, str(config or "settings"))


def resumed_settings(run: str | Path, stated: Mapping[str, Any]) -> TuneSettings:
    """A run's own settings with those changes that leave its result comparable; refuses others."""
    own = RunFolder.open(run).read_settings().model_dump()
    free = {*Sampling.model_fields, *RESUMED_ANEW} - {"window"}  # what is tuned on
    fixed = [name for name, value in stated.items() if name not in free and own.get(name) != value]
    if fixed:
        raise SettingsError(
            f"{run}: {fixed[0]} cannot change when a run is resumed; it is {own.get(fixed[0], 'unknown')!r}. "
            "Leave it out, or start a new run"
        )
    return checked(TuneSettings, {**own, **stated})


def tuning(settings: TuneSettings, *, out: str | Path | None = None, resume: str | Path | None = None) -> Job:
    """Tune a clip, save the adapter and make the edits; closing the job early leaves a run that can be resumed."""
    from tuneavideo import jobs

    yield from jobs.tune(settings, out=out, resume=resume)


def editing(settings: EditSettings) -> Job:
    """Make the edits of a tuned clip."""
    from tuneavideo import jobs

    yield from jobs.edit(settings)


def inverting(settings: EditSettings) -> Job:
    """Invert a tuned clip to the level its edits start from."""
    from tuneavideo import jobs

    yield from jobs.invert(settings)


def demoing(out: str | Path | None = None, quick: bool = False) -> Job:
    """Tune the bundled miniature on its first clip, edit it four times, and draw `edits.png` of source and edits."""
    from tuneavideo import jobs

    clip = miniature.clips()[0]
    stated = {"video": str(clip["path"]), "prompt": clip["caption"], "edit": miniature.DEMO_EDITS, "stride": 2}
    if quick:
        stated |= {"max_train_steps": 5, "num_inference_steps": 5, "num_inv_steps": 5}
    yield from jobs.demo(tune_settings(stated), out=out)


def models() -> list[dict[str, Any]]:
    """The table of bases: `name`, `source`, `note`, own `settings`, and whether it is `here` (on this machine)."""
    return [
        {
            "name": name,
            "source": base.source,
            "note": base.note,
            "settings": dict(base.settings),
            "here": _is_here(base.source),
        }
        for name, base in BASES.items()
    ]


def _is_here(source: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return Path(source).is_absolute() or isinstance(try_to_load_from_cache(source, "model_index.json"), str)


def _listed(prompts: str | Iterable[str]) -> tuple[str, ...]:
    return (prompts,) if isinstance(prompts, str) else tuple(prompts)


def _listened(job: Job, listener: Listener | None) -> list[Progress]:
    """Run a job to its end; returns where files were finished."""
    finished = []
    for each in job:
        if listener:
            listener(each)
        if each.path:
            finished.append(each)
    return finished
