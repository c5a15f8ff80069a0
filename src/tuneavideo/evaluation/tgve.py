"""LOVEU-TGVE-2023 benchmark (Wu et al. 2023): 76 clips with four edits each.

DIR/<set>/480p_frames/<video>/*.jpg          frames; sets are DAVIS_480p, videvo_480p, youtube_480p
DIR/**/*.yaml or DIR/*.csv                   captions and prompts: the benchmark's configs, or its table

OUT/runs/<set>/<video>/                      run folders, with scores.json
OUT/submission/<set>/<video>/<kind>/00000.jpg
OUT/results.json, OUT/results.md
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from PIL import Image

from tuneavideo import video as videos
from tuneavideo.errors import SettingsError, VideoError
from tuneavideo.evaluation.evaluate import EvaluationSettings, evaluate
from tuneavideo.evaluation.metrics import format_score
from tuneavideo.evaluation.metrics.table import METRICS
from tuneavideo.evaluation.score_file import FORMAT
from tuneavideo.progress import Events, Progress
from tuneavideo.settings import TuneSettings
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import RunFolder

KINDS = ("style", "object", "background", "multiple")
SIDE = 480
SEED = 33  # of all configs of the benchmark; its table has none
JPEG_QUALITY = 95

Tune = Callable[..., Events]
CompleteSettings = Callable[[Mapping[str, Any]], TuneSettings]


@dataclass(frozen=True)
class Clip:
    """A clip of the benchmark: its `count` frames and caption, and a prompt for every kind of edit."""

    set: str
    name: str
    frames: Path
    caption: str
    prompts: Mapping[str, str]
    count: int
    width: int = SIDE
    height: int = SIDE
    seed: int = SEED

    def settings(self) -> dict[str, Any]:
        """Return the settings of a tuning that the benchmark prescribes."""
        return {
            "video": str(self.frames), "prompt": self.caption, "edit": tuple(dict.fromkeys(self.prompts.values())),
            "num_frames": self.count, "stride": 1, "width": self.width, "height": self.height, "seed": self.seed,
            "formats": ("frames",),
        }  # fmt: skip


def read_clips(data: Path) -> list[Clip]:
    """Read the clips of a folder from its configs, or if there are none from its table.

    Raises:
        VideoError: Frames are missing.
        SettingsError: There is neither a config nor a table, or one has another format.
    """
    sets = sorted(folder.parent for folder in data.glob("**/480p_frames"))
    if not sets:
        raise VideoError(f"{data}: no frames found; expected <set>/480p_frames/<video>/*.jpg, as in LOVEU-TGVE-2023")
    configs = [clip for file in sorted(data.glob("**/*.yaml")) if (clip := _read_config(file, sets[0].parent))]
    clips = configs or [clip for file in sorted(data.glob("**/*.csv")) for clip in _read_table(file, sets)]
    if not clips:
        raise SettingsError(f"{data}: no configs (*.yaml) and no table (*.csv) of captions and prompts found")
    return clips


def run(
    data: Path,
    out: Path,
    *,
    tune: Tune,
    complete: CompleteSettings,
    clips: int | None = None,
    evaluation: EvaluationSettings,
) -> Events:
    """Tune, edit and evaluate the clips, and write submission and results; a second call continues a stopped one.

    Args:
        data: Folder of the benchmark.
        out: Folder to make, or to continue.
        tune: Function that tunes and edits: `jobs.tune`.
        complete: Function that adds the settings which a clip does not prescribe.
        clips: Number of clips, evenly spaced; all if None.
        evaluation: Metrics and their models. Metrics that use a mask are left out, as the benchmark has none.
    """
    chosen = read_clips(data)
    chosen = chosen[:: max(1, len(chosen) // clips)][:clips] if clips else chosen
    atomic.refuse_foreign(out / "results.json", f'"format": {FORMAT}')
    atomic.refuse_foreign(out / "results.md", "# LOVEU-TGVE-2023")
    done: list[tuple[Clip, RunFolder]] = []
    for clip in chosen:
        folder = RunFolder(out / "runs" / clip.set / clip.name)
        yield from _tune(folder, complete(clip.settings()), tune)
        yield from _evaluate(folder, evaluation)
        for kind in KINDS:
            _submit(folder, clip.prompts[kind], out / "submission" / clip.set / clip.name / kind)
        done.append((clip, folder))
        results = _results(done)
        atomic.write(out / "results.json", json.dumps(results, indent=1))
        atomic.write(out / "results.md", markdown(results))
    yield Progress("results", path=out / "results.json")


def markdown(results: Mapping[str, Any]) -> str:
    """Format results as a Markdown table with the published baseline."""
    columns = ["all", *KINDS]
    lines = [
        "# LOVEU-TGVE-2023",
        "",
        f"{results['clips']} clips, {results['edits']} edits; base `{results['base']}`, preset `{results['preset']}`, "
        f"{results['steps']} steps.",
        "",
        f"| metric | unit | better | {' | '.join(columns)} | Tune-A-Video, published |",
        f"|---|---|---|{'---|' * (len(columns) + 1)}",
    ]
    for name, metric in results["metrics"].items():
        values = [format_score(results["means"][kind].get(name)) for kind in columns]
        cells = [name, metric["unit"], metric["better"], *values, format_score(metric["baseline"])]
        lines.append(f"| {' | '.join(cells)} |")
    sources = sorted({metric["baseline_source"] for metric in results["metrics"].values()} - {None})
    lines += ["", *(f"Published: {source}." for source in sources), *(f"Measured with {m}." for m in results["models"])]
    lines += [f"Not measured: {each['metric']}: {each['why']}" for each in results["missing"]]
    return "\n".join(lines) + "\n"


def _read_config(file: Path, root: Path) -> Clip | None:
    """Read one of the benchmark's YAML files; None for a YAML file of another kind."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not {"train_data", "validation_data"} <= config.keys():
            return None
        data, prompts = config["train_data"], config["validation_data"]["prompts"]
        folder = Path(data["video_path"])
        frames = root / folder.parent.parent.name / "480p_frames" / folder.name
        return _check_frames(Clip(
            folder.parent.parent.name, folder.name, frames, data["prompt"].strip(),
            {kind: prompts[kind].strip() for kind in KINDS}, int(data["num_frames"]), int(data["width"]),
            int(data["height"]), int(config.get("seed", SEED)),
        ))  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError) as error:
        found = f"{type(error).__name__} {' '.join(str(error).split())[:100]}"
        raise SettingsError(
            f"{file}: expected train_data with video_path, prompt, num_frames, width, height and "
            f"validation_data.prompts with {', '.join(KINDS)}; found {found}"
        ) from None


def _read_table(file: Path, sets: Sequence[Path]) -> Iterator[Clip]:
    """Read the benchmark's table; rows without prompts are headings of its sets."""
    columns = {kind: f"{kind.title()} Change{'s' if kind == 'multiple' else ''} Caption" for kind in KINDS}
    expected = ["Video name", "Our GT caption", *columns.values()]
    with file.open(encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text)
        if missing := [name for name in expected if name not in (rows.fieldnames or ())]:
            raise SettingsError(f"{file}: expected the columns {', '.join(expected)}; {missing[0]!r} is missing")
        for row in rows:
            name, caption = (row["Video name"] or "").strip(), (row["Our GT caption"] or "").strip()
            prompts = {kind: (row[column] or "").strip() for kind, column in columns.items()}
            if not caption or not all(prompts.values()):
                continue
            folders = [each / "480p_frames" / name for each in sets]
            frames = next((folder for folder in folders if folder.is_dir()), folders[0])
            clip = _check_frames(Clip(frames.parent.parent.name, name, frames, caption, prompts, 0))
            yield replace(clip, count=sum(1 for each in frames.iterdir() if each.suffix == ".jpg"))


def _check_frames(clip: Clip) -> Clip:
    if not clip.frames.is_dir():
        raise VideoError(f"{clip.frames} is missing: the frames of {clip.set}/{clip.name}; unpack the data set there")
    return clip


def _tune(folder: RunFolder, settings: TuneSettings, tune: Tune) -> Events:
    """Start or resume the run of a clip, unless it is complete."""
    if not folder.settings.is_file():
        yield from tune(settings, out=folder.path)
        return
    earlier, current = folder.read_settings().model_dump(), settings.model_dump()
    for name in earlier.keys() - {"video"}:  # the data may have moved
        if earlier[name] != current[name]:
            raise SettingsError(
                f"{folder.path} was made with {name} {earlier[name]!r}, not {current[name]!r}; give another --out"
            )
    if not (folder.is_tuned and folder.edited() >= set(product(settings.edit, settings.seeds))):
        yield from tune(settings, resume=folder.path)


def _evaluate(folder: RunFolder, evaluation: EvaluationSettings) -> Events:
    """Compute the metrics that any edit of a run lacks."""
    edits = (folder.read_scores() or {"edits": []})["edits"]
    scored = [edit["scores"].keys() for edit in edits] if len(edits) == len(folder.whole_edits()) else [{}]
    names = [
        name for name in evaluation.names(folder.read_settings())
        if METRICS[name].requires != "mask" and not all(name in scores for scores in scored)
    ]  # fmt: skip
    if names:
        yield from evaluate([folder.path], replace(evaluation, metrics=names))


def _submit(folder: RunFolder, prompt: str, target: Path) -> None:
    """Write the frames of an edit as the submission's JPEG files, unless they exist."""
    if target.is_dir():
        return
    with atomic.replacing(target) as draft:
        draft.mkdir()
        for number, image in enumerate(videos.read(folder.read_clip(_edit_of(folder, prompt))).images):
            Image.fromarray(image).save(draft / f"{number:05d}.jpg", quality=JPEG_QUALITY)


def _edit_of(folder: RunFolder, prompt: str) -> Path:
    return next(edit for edit in folder.whole_edits() if folder.read_edit(edit)["prompt"] == prompt)


def _results(done: list[tuple[Clip, RunFolder]]) -> dict[str, Any]:
    """Collect the score rows of all clips and edits, and their means by kind of edit."""
    rows, missing, metrics = [], {}, {}
    for clip, folder in done:
        scores = folder.read_scores() or {"edits": [], "missing": [], "metrics": {}}
        by_folder = {edit["folder"]: edit["scores"] for edit in scores["edits"]}
        metrics |= scores["metrics"]
        missing |= {(each["metric"], each["why"]): None for each in scores["missing"]}
        for kind in KINDS:
            prompt = clip.prompts[kind]
            row = {"set": clip.set, "video": clip.name, "kind": kind, "prompt": prompt}
            rows.append(row | {"scores": by_folder.get(_edit_of(folder, prompt).name, {})})
    settings = done[0][1].read_settings()
    results = (score for row in rows for score in row["scores"].values())
    return {
        "format": FORMAT, "base": settings.base, "preset": settings.preset, "steps": settings.max_train_steps,
        "clips": len(done), "edits": len(rows), "metrics": {name: metrics[name] for name in METRICS if name in metrics},
        "models": sorted({f"{each['model']} {each['revision'] or ''}".strip() for each in results}),
        "means": {kind: _means(rows, kind) for kind in ("all", *KINDS)},
        "missing": [{"metric": name, "why": why} for name, why in missing], "rows": rows,
    }  # fmt: skip


def _means(rows: list[dict[str, Any]], kind: str) -> dict[str, float]:
    of_kind = [row["scores"] for row in rows if kind in ("all", row["kind"])]
    values = {name: [scores[name]["value"] for scores in of_kind if name in scores] for name in METRICS}
    return {name: mean(numbers) for name, numbers in values.items() if numbers}
