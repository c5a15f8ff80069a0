"""LOVEU-TGVE-2023 (Wu et al. 2023): 76 clips, four edits each; reads the benchmark's data, writes its submission.

DIR/<set>/480p_frames/<video>/*.jpg          the clips: DAVIS_480p, videvo_480p, youtube_480p
DIR/**/*.yaml or DIR/*.csv                   captions and prompts: its configs, or its table

OUT/runs/<set>/<video>/                      run folders, with scores.json
OUT/submission/<set>/<video>/<kind>/00000.jpg
OUT/results.json, OUT/results.md
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from PIL import Image

from tuneavideo import video as videos
from tuneavideo.cli.tables import number
from tuneavideo.errors import SettingsError, VideoError
from tuneavideo.evaluation import evaluate
from tuneavideo.evaluation.metrics.table import METRICS
from tuneavideo.progress import Job, Progress
from tuneavideo.settings import TuneSettings
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import RunFolder

KINDS = ("style", "object", "background", "multiple")
SIDE = 480
SEED = 33
"""Of the benchmark's configs, for what has none."""
QUALITY = 95

Tune = Callable[..., Job]
Settle = Callable[[Mapping[str, Any]], TuneSettings]


@dataclass(frozen=True)
class Clip:
    """A clip of the benchmark: its frames and caption, and a prompt for every kind of edit."""

    set: str
    name: str
    frames: Path
    caption: str
    prompts: Mapping[str, str]
    count: int
    width: int = SIDE
    height: int = SIDE
    seed: int = SEED

    def stated(self) -> dict[str, Any]:
        """What the benchmark settles of a tuning; the rest is the base's, the preset's and the user's."""
        return {
            "video": str(self.frames), "prompt": self.caption, "edit": tuple(dict.fromkeys(self.prompts.values())),
            "num_frames": self.count, "stride": 1, "width": self.width, "height": self.height, "seed": self.seed,
            "formats": ("frames",),
        }  # fmt: skip


def clips_of(data: Path) -> list[Clip]:
    """The clips of a folder, by the configs in it, or if there are none by its table.

    Raises:
        VideoError: Frames are not where they should be.
        SettingsError: There is neither a config nor a table, or one of them is not as the benchmark has it.
    """
    sets = sorted(folder.parent for folder in data.glob("**/480p_frames"))
    if not sets:
        raise VideoError(f"{data}: no frames found; expected <set>/480p_frames/<video>/*.jpg, as LOVEU-TGVE-2023 has")
    configs = [clip for file in sorted(data.glob("**/*.yaml")) if (clip := _by_config(file, sets[0].parent))]
    found = configs or [clip for file in sorted(data.glob("**/*.csv")) for clip in _by_table(file, sets)]
    if not found:
        raise SettingsError(f"{data}: no configs (*.yaml) and no table (*.csv) of captions and prompts found")
    return found


def run(
    data: Path, out: Path, *, tune: Tune, settle: Settle, clips: int | None = None, wish: evaluate.Wish | None = None
) -> Job:
    """Tune, edit and measure the clips, and write submission and results; what is done already is not done again.

    Args:
        data: Folder of the benchmark.
        out: Folder to make or go on with.
        tune: Tunes and edits: `jobs.tune`.
        settle: Makes whole settings of what a clip states.
        clips: How many clips, evenly spread; all if None.
        wish: What to measure; by default all but what needs masks, which the benchmark has not.
    """
    chosen = clips_of(data)
    chosen = chosen[:: max(1, len(chosen) // clips)][:clips] if clips else chosen
    atomic.refuse_foreign(out / "results.json", f'"format": {evaluate.FORMAT}')
    atomic.refuse_foreign(out / "results.md", "# LOVEU-TGVE-2023")
    done: list[tuple[Clip, RunFolder]] = []
    for clip in chosen:
        folder = RunFolder(out / "runs" / clip.set / clip.name)
        yield from _tuned(folder, settle(clip.stated()), tune)
        yield from _measured(folder, wish or evaluate.Wish())
        for kind in KINDS:
            _submit(folder, clip.prompts[kind], out / "submission" / clip.set / clip.name / kind)
        done.append((clip, folder))
        results = _results(done)
        atomic.write(out / "results.json", json.dumps(results, indent=1))
        atomic.write(out / "results.md", markdown(results))
    yield Progress("results", path=out / "results.json")


def markdown(results: Mapping[str, Any]) -> str:
    """The table of results beside what was published."""
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
        values = [number(results["means"][kind].get(name)) for kind in columns]
        cells = [name, metric["unit"], metric["better"], *values, number(metric["baseline"])]
        lines.append(f"| {' | '.join(cells)} |")
    sources = sorted({metric["baseline_source"] for metric in results["metrics"].values()} - {None})
    lines += ["", *(f"Published: {source}." for source in sources), *(f"Measured with {m}." for m in results["models"])]
    lines += [f"Not measured: {each['metric']}: {each['why']}" for each in results["missing"]]
    return "\n".join(lines) + "\n"


def _by_config(file: Path, root: Path) -> Clip | None:
    """The clip of one of the benchmark's YAML files; None if it is another's."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not {"train_data", "validation_data"} <= config.keys():
            return None
        data, prompts = config["train_data"], config["validation_data"]["prompts"]
        place = Path(data["video_path"])
        frames = root / place.parent.parent.name / "480p_frames" / place.name
        return _found(Clip(
            place.parent.parent.name, place.name, frames, data["prompt"].strip(),
            {kind: prompts[kind].strip() for kind in KINDS}, int(data["num_frames"]), int(data["width"]),
            int(data["height"]), int(config.get("seed", SEED)),
        ))  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError, yaml.YAMLError) as error:
        told = f"{type(error).__name__} {' '.join(str(error).split())[:100]}"
        raise SettingsError(
            f"{file}: expected train_data with video_path, prompt, num_frames, width, height and "
            f"validation_data.prompts with {', '.join(KINDS)}; found {told}"
        ) from None


def _by_table(file: Path, sets: list[Path]) -> Iterator[Clip]:
    """The clips of the benchmark's table; rows that are headings of its parts have no prompts."""
    columns = {kind: f"{kind.title()} Change{'s' if kind == 'multiple' else ''} Caption" for kind in KINDS}
    wanted = ["Video name", "Our GT caption", *columns.values()]
    with file.open(encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text)
        if lacking := [name for name in wanted if name not in (rows.fieldnames or ())]:
            raise SettingsError(f"{file}: expected the columns {', '.join(wanted)}; {lacking[0]!r} is missing")
        for row in rows:
            name, caption = (row["Video name"] or "").strip(), (row["Our GT caption"] or "").strip()
            prompts = {kind: (row[column] or "").strip() for kind, column in columns.items()}
            if not caption or not all(prompts.values()):
                continue
            folders = [each / "480p_frames" / name for each in sets]
            frames = next((folder for folder in folders if folder.is_dir()), folders[0])
            clip = _found(Clip(frames.parent.parent.name, name, frames, caption, prompts, 0))
            yield replace(clip, count=sum(1 for each in frames.iterdir() if each.suffix == ".jpg"))


def _found(clip: Clip) -> Clip:
    if not clip.frames.is_dir():
        raise VideoError(f"{clip.frames} is missing: the frames of {clip.set}/{clip.name}; unpack the data set there")
    return clip


def _tuned(folder: RunFolder, settings: TuneSettings, tune: Tune) -> Job:
    """A clip's run to its end, from where it is."""
    if not folder.settings.is_file():
        yield from tune(settings, out=folder.path)
        return
    own, wanted = folder.read_settings().model_dump(), settings.model_dump()
    for name in own.keys() - {"video"}:  # the data may have moved
        if own[name] != wanted[name]:
            raise SettingsError(
                f"{folder.path} was made with {name} {own[name]!r}, not {wanted[name]!r}; give another --out"
            )
    if not (folder.is_tuned and folder.edited() >= set(product(settings.edit, settings.seeds))):
        yield from tune(settings, resume=folder.path)


def _measured(folder: RunFolder, wish: evaluate.Wish) -> Job:
    """Measure what has not been measured."""
    had = folder.read_scores() or {"edits": []}
    measured = (
        [edit["scores"].keys() for edit in had["edits"]] if len(had["edits"]) == len(folder.whole_edits()) else [{}]
    )
    names = wish.names(folder.read_settings())
    needed = [name for name in names if METRICS[name].need != "mask" and not all(name in had for had in measured)]
    if needed:
        yield from evaluate.evaluate([folder.path], replace(wish, metrics=needed))


def _submit(folder: RunFolder, prompt: str, place: Path) -> None:
    if place.is_dir():
        return
    with atomic.replacing(place) as draft:
        draft.mkdir()
        for number_, image in enumerate(videos.read(folder.read_clip(_edit_of(folder, prompt))).images):
            Image.fromarray(image).save(draft / f"{number_:05d}.jpg", quality=QUALITY)


def _edit_of(folder: RunFolder, prompt: str) -> Path:
    return next(edit for edit in folder.whole_edits() if folder.read_edit(edit)["prompt"] == prompt)


def _results(done: list[tuple[Clip, RunFolder]]) -> dict[str, Any]:
    """Means over all pairs of clip and edit, by kind, and the rows they are of."""
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
        "format": evaluate.FORMAT, "base": settings.base, "preset": settings.preset, "steps": settings.max_train_steps,
        "clips": len(done), "edits": len(rows), "metrics": {name: metrics[name] for name in METRICS if name in metrics},
        "models": sorted({f"{each['model']} {each['revision'] or ''}".strip() for each in results}),
        "means": {kind: _means(rows, kind) for kind in ("all", *KINDS)},
        "missing": [{"metric": name, "why": why} for name, why in missing], "rows": rows,
    }  # fmt: skip


def _means(rows: list[dict[str, Any]], kind: str) -> dict[str, float]:
    of_kind = [row["scores"] for row in rows if kind in ("all", row["kind"])]
    values = {name: [scores[name]["value"] for scores in of_kind if name in scores] for name in METRICS}
    return {name: mean(numbers) for name, numbers in values.items() if numbers}
