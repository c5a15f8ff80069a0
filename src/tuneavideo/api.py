"""Functions of the package: each runs a job to its end and returns the files that it made.

The command line uses `Job` and the functions that merge settings. torch is imported when a job starts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuneavideo.bases import BASES
from tuneavideo.errors import RunError, SettingsError
from tuneavideo.job import Job as Job
from tuneavideo.job import Listener
from tuneavideo.job_settings import clip_edit_settings as clip_edit_settings
from tuneavideo.job_settings import edit_settings as edit_settings
from tuneavideo.job_settings import is_clip_edit as is_clip_edit
from tuneavideo.job_settings import merge_settings as merge_settings
from tuneavideo.job_settings import read_config as read_config
from tuneavideo.job_settings import read_edit_config as read_edit_config
from tuneavideo.job_settings import resumed_settings as resumed_settings
from tuneavideo.job_settings import tune_settings as tune_settings
from tuneavideo.storage.run_folder import RunFolder

if TYPE_CHECKING:
    from tuneavideo.interop.convert import Report

logger = logging.getLogger(__name__)


def tune(
    video: str | Path,
    prompt: str,
    *,
    edit: str | Iterable[str] = (),
    out: str | Path | None = None,
    config: str | Path | None = None,
    progress: Listener | bool = True,
    **settings: Any,
) -> Path:
    """Tune a text-to-image model on one clip, and edit the clip.

    Args:
        video: Clip: a video file, a GIF or a folder of images.
        prompt: Caption of the clip.
        edit: Prompts of edits to make after tuning.
        out: Run folder to create. None: the next free `runs/<clip>-<n>`.
        config: YAML file of further settings.
        progress: True shows bars, False nothing; a function is called with a `Progress` after every step.
        **settings: Fields of `TuneSettings`, such as `base`, `preset`, `max_train_steps`, `learning_rate`.

    Returns:
        The run folder, with the adapter in `adapter/` and the edits in `edits/`.

    Raises:
        TuneAVideoError: An error that the user can correct. A run that had begun can be resumed with `resume`.
    """
    read = read_config(config) if config else None
    values = {"video": str(video), "prompt": prompt, "edit": _as_tuple(edit), **settings}
    job = Job.tune(merge_settings(values, read), out=out or (read and read.out))
    return next(each.path for each in job.run(progress) if each.path)


def resume(run: str | Path, *, progress: Listener | bool = True, **settings: Any) -> Path:
    """Continue a tuning that was stopped, to the result of an unbroken one.

    Args:
        run: Run folder.
        progress: As in `tune`.
        **settings: Settings that may change: `edit`, `max_train_steps`, `learning_rate`, `mixed_precision`, `memory`,
            `gradient_checkpointing`, `offload`, and those of checkpoints, previews, trackers and edits. `memory` then
            chooses only among settings without an effect on the result.

    Returns:
        The run folder.

    Raises:
        SettingsError: Another setting differs from the run's.
        RunError: There is no such run, it is in use, or it is finished.
        TuneAVideoError: As in `tune`.
    """
    job = Job.tune(resumed_settings(run, settings), resume=run)
    return next(each.path for each in job.run(progress) if each.path)


def edit(
    run: str | Path,
    prompts: str | Iterable[str],
    *,
    source_prompt: str | None = None,
    out: str | Path | None = None,
    config: str | Path | None = None,
    progress: Listener | bool = True,
    **settings: Any,
) -> list[Path]:
    """Make new videos with the motion of a clip, one per prompt and seed.

    Args:
        run: Run folder of the tuned clip; or a clip (a video file, a GIF or a folder of images), which is edited
            without tuning, in a new run folder that `resume` can tune afterwards.
        prompts: Prompts of the edits.
        source_prompt: Caption of a clip.
        out: Run folder to create for a clip. None: the next free `runs/<clip>-<n>`.
        config: YAML file of settings.
        progress: As in `tune`.
        **settings: Fields of `EditSettings`, such as `guidance_scale` or `strength`; the others are the run's own. Of a
            clip also fields of `TuneSettings`, such as `base` or `num_frames`.

    Returns:
        The folder of each edit, with `edit.mp4`, `side-by-side.mp4` and `edit.json`.

    Raises:
        RunError: There is no such run, it is in use, or its tuning was stopped.
        TuneAVideoError: As in `tune`.
    """
    own = {"source_prompt": source_prompt} if source_prompt is not None else {}
    values = {"run": str(run), "prompt": _as_tuple(prompts), **own, **settings}
    events = edit_job(values, config, out).run(progress)
    return [each.path for each in events if each.stage == "edit" and each.path]


def edit_job(values: Mapping[str, Any], config: str | Path | None = None, out: str | Path | None = None) -> Job:
    """Return the job of `edit`, on a run or on a clip.

    Args:
        values: Settings of the edits, with `run`.
        config: YAML file of settings.
        out: Run folder to create for a clip.

    Raises:
        TuneAVideoError: As in `edit`.
    """
    if is_clip_edit(values):
        return Job.edit_clip(*clip_edit_settings(values, config), out=out)
    return Job.edit(edit_settings({**values, **({"out": out} if out else {})}, config))


def invert(run: str | Path, *, progress: Listener | bool = True, **settings: Any) -> Path:
    """Invert a tuned clip to noise (DDIM), and keep the latents in the run folder for later edits.

    Args:
        run: Run folder of the tuned clip.
        progress: As in `tune`.
        **settings: Fields of `EditSettings`; those with an effect are `num_inference_steps`, `num_inv_steps`,
            `strength`, `sampler`, `timestep_spacing`, `attention_injection`, `window` and the additional models.

    Returns:
        A safetensors file with `latents`: `1 C T H W` at the timestep that edits start from, or with attention
        injection `S C T H W`, at every timestep from there to the clean clip.

    Raises:
        TuneAVideoError: As in `edit`.
    """
    values = {"run": str(run), "prompt": ("-",), **settings}
    events = Job.invert(edit_settings(values)).run(progress)
    return next(each.path for each in reversed(events) if each.path)


def adopt(
    video: str | Path,
    prompt: str,
    checkpoint: str | Path,
    *,
    edit: str | Iterable[str] = (),
    out: str | Path | None = None,
    config: str | Path | None = None,
    own_base: bool = False,
    progress: Listener | bool = True,
    **settings: Any,
) -> Path:
    """Make a run of weights that another program tuned on a clip, to edit the clip here.

    Args:
        video: Clip that the weights were tuned on.
        prompt: Caption of the clip.
        checkpoint: Folder, .pth, .ckpt or .safetensors of the tuned weights.
        edit: Prompts of edits to make.
        out: Run folder to create. None: the next free `runs/<clip>-<n>`.
        config: YAML file of further settings.
        own_base: Convert the image model in `checkpoint` too, instead of loading `base`.
        progress: As in `tune`.
        **settings: Fields of `TuneSettings`.

    Returns:
        The run folder.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, malicious, or was not tuned on a clip.
        TuneAVideoError: As in `tune`.
    """
    values = {"video": str(video), "prompt": prompt, "edit": _as_tuple(edit), **settings}
    job = Job.adopt(tune_settings(values, config), checkpoint, out=out, own_base=own_base)
    return next(each.path for each in job.run(progress) if each.path)


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str,
    base: str | None = None,
    like: str | None = None,
    rank: int = 64,
    style: Literal["diffusers", "kohya"] = "diffusers",
    dtype: Literal["fp32", "fp16", "bf16"] | None = None,
    binary: bool = True,
) -> Report:
    """Convert a checkpoint of one program to files of another, one tensor at a time.

    Args:
        source: Run, adapter, diffusers folder, output of the published code, file of tuned layers, MindONE `.ckpt` or
            single-file checkpoint.
        out: New folder; a new file for `mindone`, `ldm` and `lora`.
        to: Format: `diffusers`, `official`, `mindone`, `ldm`, `lora` or `adapter`.
        base: Base of tuned layers. None: the base that an adapter names.
        like: Model with configs, tokenizer and scheduler, if the source has none.
        rank: Rank of a LoRA, at least 1.
        style: Tensor names of a LoRA.
        dtype: Precision of the new files. None: that of each tensor.
        binary: Write `official` as `.bin`, which the published code reads, otherwise as safetensors.

    Returns:
        Counts and names of used, missing and unused tensors.

    Raises:
        CheckpointError: The source is damaged, malicious, of an unknown format or not a whole model. No incomplete file
            is left.
    """
    from tuneavideo.interop import convert

    return convert.convert(
        Path(source), Path(out), to, base=base, like=like, rank=rank, style=style, dtype=dtype, binary=binary
    )


def evaluate(
    runs: str | Path | Iterable[str | Path],
    *,
    metrics: Iterable[str] = (),
    mask: str | Path | None = None,
    clip: str | None = None,
    pick: str | None = None,
    progress: Listener | bool = True,
) -> list[Path]:
    """Score the edits of runs, and write the scores into the run folders.

    Args:
        runs: Run folders, or folders of single edits.
        metrics: Names of metrics (docs/evaluation.md). None given: all that suit the run's base.
        mask: Picture, clip or folder of pictures, bright where edits may change the clip.
        clip: Hub id or folder of CLIP. None: ViT-L/14.
        pick: Hub id or folder of PickScore. None: its own.
        progress: As in `tune`, after every edit.

    Returns:
        The `scores.json` of every run, which also has the metrics without a value and the reasons.

    Raises:
        SettingsError: A metric is unknown.
        RunError: None of the folders is a run or an edit.
        TuneAVideoError: As in `tune`.
    """
    job = Job.evaluate(_as_tuple(runs), metrics=metrics, mask=mask, clip=clip, pick=pick)
    return [each.path for each in job.run(progress) if each.path]


def report(runs: str | Path | Iterable[str | Path], out: str | Path | None = None) -> Path:
    """Write an HTML page on runs: clips, prompts, scores, the loss, settings, time and memory.

    Args:
        runs: Run folders, or folders of runs; several are compared with the first. A folder that is no run is left out
            with a warning.
        out: HTML file to write, which contains all clips. None: `report.html` in the run folder, or in the current
            folder for several runs.

    Returns:
        The file. The page lists what is damaged or missing in a run.

    Raises:
        RunError: None of the folders is a run.
        SettingsError: There is no folder, or `out` exists and is no report.
        DiskError: The file cannot be written.
    """
    from tuneavideo.reporting import write

    folders, errors = list[RunFolder](), list[RunError]()
    for run in (each for place in _as_tuple(runs) for each in _runs_in(Path(place))):
        try:
            folders.append(RunFolder.open(run))
        except RunError as error:
            errors.append(error)
    if not folders:
        raise errors[0] if errors else SettingsError("no run to report; give one or more run folders")
    for each in errors:
        logger.warning("left out: %s", each)
    path = Path(out or (folders[0].report if len(folders) == 1 else RunFolder(Path()).report))
    write(folders, path)
    return path


def _runs_in(place: Path) -> list[Path]:
    """Return the runs in a folder of runs, with those that failed before they began; any other place as it is."""
    if RunFolder(place).settings.is_file() or not place.is_dir():
        return [place]
    inside = (RunFolder(path) for path in sorted(place.iterdir()) if path.is_dir())
    return [run.path for run in inside if run.settings.is_file() or run.error.is_file()] or [place]


def models() -> list[dict[str, Any]]:
    """Return the table of bases.

    Each row has `name`, `source`, `note`, `settings`, `resolution` in pixels, `num_frames` and `memory_gb` (see
    `Base`), and `here`: whether the base is on this machine.
    """
    return [
        {
            "name": name,
            "source": base.source,
            "note": base.note,
            "settings": dict(base.settings),
            "resolution": base.settings["resolution"],
            "num_frames": base.frames,
            "memory_gb": base.memory_gb,
            "here": _is_here(base.source),
        }
        for name, base in BASES.items()
    ]


def _is_here(source: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return Path(source).is_absolute() or isinstance(try_to_load_from_cache(source, "model_index.json"), str)


def _as_tuple(values: Any) -> tuple[Any, ...]:
    return (values,) if isinstance(values, str | Path) else tuple(values)
