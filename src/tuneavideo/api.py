"""Functions for scripts: each runs a job to its end and returns the files that it made.

The command line and web pages use `Job` and the functions that merge settings. torch is imported when a job starts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tuneavideo.bases import BASES
from tuneavideo.errors import RunError, SettingsError
from tuneavideo.job import Job as Job
from tuneavideo.job import Listener
from tuneavideo.job_settings import edit_settings as edit_settings
from tuneavideo.job_settings import merge_settings as merge_settings
from tuneavideo.job_settings import read_config
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
    """Teach a text-to-image model the motion of one clip, and edit the clip.

    Args:
        video: Clip to learn from: a video file, a GIF or a folder of images.
        prompt: What the clip shows, in words.
        edit: New prompts to edit the clip with when it is tuned.
        out: Run folder to make; by default the next free `runs/<clip>-<n>`.
        config: YAML file of further settings.
        progress: True shows bars, False nothing; a function is called with a `Progress` after every step.
        **settings: Any field of `TuneSettings`, such as `base`, `preset`, `max_train_steps`, `learning_rate`.

    Returns:
        The run folder; the adapter is in its `adapter/`, the edits are in its `edits/`.

    Raises:
        TuneAVideoError: Something the user can put right; nothing is left half-written.
    """
    read = read_config(config) if config else None
    stated = {"video": str(video), "prompt": prompt, "edit": _listed(edit), **settings}
    job = Job.tune(merge_settings(stated, read, str(config)), out=out or (read and read.out))
    return next(each.path for each in job.run(progress) if each.path)


def resume(run: str | Path, *, progress: Listener | bool = True, **settings: Any) -> Path:
    """Go on with a tuning that was stopped, to the result of an unbroken one.

    Args:
        run: Its run folder.
        progress: True shows bars, False nothing; a function is called with a `Progress` after every step.
        **settings: Only `edit`, `max_train_steps`, `learning_rate`, `mixed_precision`, settings that save memory
            (`gradient_checkpointing`, `offload`, `memory`), what is kept on the way and how edits are made may differ
            from the run's own. `memory` chooses only among those that leave the result as it is.
    """
    job = Job.tune(resumed_settings(run, settings), resume=run)
    return next(each.path for each in job.run(progress) if each.path)


def edit(
    run: str | Path,
    prompts: str | Iterable[str],
    *,
    config: str | Path | None = None,
    progress: Listener | bool = True,
    **settings: Any,
) -> list[Path]:
    """Make new videos with the motion of a tuned clip, one per prompt and seed.

    Args:
        run: Run folder of the tuned clip.
        prompts: What the edits should show.
        config: YAML file of settings.
        progress: True shows bars, False nothing; a function is called with a `Progress` after every step.
        **settings: Any field of `Sampling`, such as `guidance_scale` or `strength`; the others are the run's own.

    Returns:
        The folder of each edit, with `edit.mp4`, `side-by-side.mp4` and `edit.json`.
    """
    stated = {"run": str(run), "prompt": _listed(prompts), **settings}
    done = Job.edit(edit_settings(stated, config)).run(progress)
    return [each.path for each in done if each.stage == "edit" and each.path]


def invert(run: str | Path, *, progress: Listener | bool = True, **settings: Any) -> Path:
    """Find the noise a tuned clip came from, and keep it in the run folder for edits to start from.

    Returns:
        The safetensors file that holds `latents`, `1 C T H W`; with attention injection `S C T H W`: where edits
        start, at each level that they pass, and clean.
    """
    stated = {"run": str(run), "prompt": ("-",), **settings}
    done = Job.invert(edit_settings(stated)).run(progress)
    return next(each.path for each in reversed(done) if each.path)


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
    """Make a run of what another program tuned on a clip, to edit it here.

    Args:
        video: The clip that was tuned on.
        prompt: What the clip shows, in words.
        checkpoint: Folder, .pth, .ckpt or .safetensors of what was tuned.
        edit: New prompts to edit the clip with.
        out: Run folder to make; by default the next free `runs/<clip>-<n>`.
        config: YAML file of further settings.
        own_base: Convert the image model in `checkpoint` too, instead of opening `base`.
        progress: True shows bars, False nothing; a function is called with a `Progress` after every step.
        **settings: Any field of `TuneSettings`.

    Returns:
        The run folder.

    Raises:
        TuneAVideoError: Something the user can put right.
    """
    stated = {"video": str(video), "prompt": prompt, "edit": _listed(edit), **settings}
    job = Job.adopt(tune_settings(stated, config), checkpoint, out=out, own_base=own_base)
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
        source: A run, an adapter, a diffusers folder, the published code's output, tuned layers alone, a MindONE
            `.ckpt` or a single-file checkpoint.
        out: New folder, or file for `mindone`, `ldm` and `lora`.
        to: `diffusers`, `official`, `mindone`, `ldm`, `lora` or `adapter`.
        base: Model that tuned layers were tuned on; by default the one an adapter names.
        like: Model whose configs, tokenizer and scheduler are used where the source has none.
        rank: Rank of a LoRA.
        style: Tensor names of a LoRA.
        dtype: Precision of the new files; by default that of each tensor.
        binary: Write `official` as `.bin`, which the published code reads, or as safetensors.

    Returns:
        Counts and names of used, missing and unused tensors.

    Raises:
        CheckpointError: The source is damaged, malicious, of an unknown format or not a whole model. No file is left
            half-written.
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
    """Measure the edits of runs, and keep the scores in the run folders.

    Args:
        runs: Run folders, or folders of single edits.
        metrics: Names of the metrics (docs/evaluation.md); by default all that suit the run's base.
        mask: Picture, clip or folder of pictures, bright where edits may change the picture.
        clip: Hub id or folder of CLIP, instead of ViT-L/14.
        pick: Hub id or folder of PickScore.
        progress: True shows bars, False nothing; a function is called with a `Progress` after every edit.

    Returns:
        The `scores.json` of every run. What could not be measured is in there too, with the reason.
    """
    places = [runs] if isinstance(runs, str | Path) else [*runs]
    job = Job.evaluate(places, metrics=metrics, mask=mask, clip=clip, pick=pick)
    return [each.path for each in job.run(progress) if each.path]


def report(runs: str | Path | Iterable[str | Path], out: str | Path | None = None) -> Path:
    """Show runs on one page: clips in step, prompts, scores, the loss, settings, time and memory.

    Args:
        runs: Run folders; several are compared, with the first as the measure.
        out: HTML file to write, which needs nothing else to be opened; by default `report.html` in the run folder, or
            in the current folder when there are several.

    Returns:
        The file.

    Raises:
        TuneAVideoError: None of the folders is a run, or a place cannot be written. Among runs, a folder that is none
            is left out with a warning. What is damaged or missing within a run is said on its page.
    """
    from tuneavideo.reporting import write

    folders, troubles = list[RunFolder](), list[RunError]()
    for run in [runs] if isinstance(runs, str | Path) else runs:
        try:
            folders.append(RunFolder.open(run))
        except RunError as error:
            troubles.append(error)
    if not folders:
        raise troubles[0] if troubles else SettingsError("no run to report; give one or more run folders")
    for trouble in troubles:
        logger.warning("left out: %s", trouble)
    path = Path(out or (folders[0].report if len(folders) == 1 else RunFolder(Path()).report))
    write(folders, path)
    return path


def models() -> list[dict[str, Any]]:
    """The table of bases.

    Each has `name`, `source`, `note`, own `settings`, default `resolution` and `num_frames`, `memory_gb` (see `Base`),
    and whether it is `here` (on this machine).
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


def _listed(prompts: str | Iterable[str]) -> tuple[str, ...]:
    return (prompts,) if isinstance(prompts, str) else tuple(prompts)
