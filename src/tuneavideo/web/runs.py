"""Run folders below the root: what they hold, and which files of them may be read."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from tuneavideo.errors import RunError, TuneAVideoError
from tuneavideo.settings import Sampling, TuneSettings
from tuneavideo.storage.run_files import EDIT, SAMPLE, number_in
from tuneavideo.storage.run_folder import RunFolder

# Files of a run that a browser may read.
READABLE = re.compile(
    r"source\.mp4|edits\.png|samples/\d{6,}-[^/\\]+\.mp4|edits/\d{3,}-[^/\\]+/(edit\.mp4|edit\.gif|side-by-side\.mp4)"
    r"|adapter/adapter\.safetensors|masks/[^/\\]+/00000\.png|exports/(lora|ldm)\.safetensors|exports/mindone\.ckpt"
)


@dataclass(frozen=True)
class Listed:
    """A run of the gallery.

    Attributes:
        name: Name of its folder.
        caption: Caption of its clip.
        base: Its base.
        steps: Number of its logged steps.
        total: Number of steps of its tuning.
        is_tuned: Whether it is tuned to its end.
        edits: Prompts of its edits.
        error: Why its last job failed.
        modified: Time of the last change, in seconds since the epoch.
        has_source: Whether its clip is there.
        is_untuned: Whether it is edited without tuning.
    """

    name: str
    caption: str
    base: str
    steps: int
    total: int
    is_tuned: bool
    edits: list[str] = field(default_factory=list)
    error: str = ""
    modified: float = 0.0
    has_source: bool = False
    is_untuned: bool = False

    @property
    def is_preview(self) -> bool:
        """Whether it shows edits without training; earlier versions made such runs by one step of no length."""
        return self.is_untuned or self.total == 1

    def matches(self, words: str) -> bool:
        """Return whether all words are in its name, caption, base or prompts."""
        text = " ".join([self.name, self.caption, self.base, *self.edits]).lower()
        return all(word in text for word in words.lower().split())


class Runs:
    """The run folders in a root folder; links to other places are left out."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        with os.scandir(self.root) as entries:
            return [each.name for each in entries if each.is_dir(follow_symlinks=False) and each.name[0] != "."]

    def open(self, name: str) -> RunFolder:
        """Return a run folder by its exact name. Raises RunError when there is none."""
        if name not in self.names():
            raise RunError("there is no such run")
        return RunFolder.open(self.root / name)

    def listed(self, words: str = "") -> list[Listed]:
        """Return the runs that match some words, the last changed first."""
        found = [run for name in self.names() if (run := self.read(name)) and run.matches(words)]
        return sorted(found, key=lambda run: -run.modified)

    def read(self, name: str) -> Listed | None:
        """Return what the gallery shows of a run; None for a folder that is no run."""
        run = RunFolder(self.root / name)
        if not run.settings.is_file():
            return None
        try:
            own = settings_of(run.settings, run.settings.stat().st_mtime_ns)
        except TuneAVideoError:
            return None
        edits = [str(edit_of(edit, (edit / "edit.json").stat().st_mtime_ns)["prompt"]) for edit in run.whole_edits()]
        changed = [file for file in (run.settings, run.path / "edits", run.adapter, run.error) if file.exists()]
        return Listed(
            name, own.prompt, own.base, count_steps(run), own.max_train_steps, run.is_tuned, edits, run.last_error,
            max(file.stat().st_mtime for file in changed), run.source.is_file(),
            run.is_untuned,
        )  # fmt: skip

    def file(self, name: str, path: str) -> Path:
        """Return a file of a run that may be read. Raises RunError for any other path."""
        run = self.open(name)
        if READABLE.fullmatch(path) and ".." not in path.split("/"):
            found = run.path / path
            places = [found, *found.parents][: len(found.relative_to(self.root).parts)]
            if found.is_file() and not any(place.is_symlink() for place in places):
                return found
        raise RunError("there is no such file")

    def edit(self, run: RunFolder, name: str) -> Path:
        """Return the folder of an edit by its exact name. Raises RunError when there is none."""
        found = [edit for edit in run.whole_edits() if edit.name == name and not edit.is_symlink()]
        if not found:
            raise RunError("there is no such edit")
        return found[0]

    def edits(self, run: RunFolder) -> list[dict[str, Any]]:
        """Return name, prompt, seed and changed settings of every edit, the last made first."""
        own = settings_of(run.settings, run.settings.stat().st_mtime_ns).model_dump(mode="json")
        made = []
        for edit in run.whole_edits():
            try:
                values = edit_of(edit, (edit / "edit.json").stat().st_mtime_ns)
            except TuneAVideoError:
                continue
            changed = {
                key: value for key, value in values.items() if key in Sampling.model_fields and own.get(key) != value
            }
            made.append({
                "folder": edit.name, "prompt": values["prompt"], "seed": values["seed"], "changed": changed,
                "values": values, "has_video": (edit / "edit.mp4").is_file(),
            })  # fmt: skip
        return made[::-1]

    def losses(self, run: RunFolder) -> list[tuple[int, float]]:
        """Return number and loss of the logged steps; the loss divided by the untuned model's if that is known."""
        steps = [step for step in run.steps() if isinstance(step, dict) and {"number", "loss"} <= step.keys()]
        return [(step["number"], step.get("relative_loss") or step["loss"]) for step in steps]

    def source(self, run: RunFolder) -> dict[str, float] | None:
        """Return `frames` and `fps` of a run's clip; None without a clip."""
        return clip_of(run.source, run.source.stat().st_mtime_ns) if run.source.is_file() else None

    def samples(self, run: RunFolder) -> dict[int, list[str]]:
        """Return the names of the previews by step."""
        found: dict[int, list[str]] = {}
        for sample in run.samples():
            found.setdefault(number_in(sample, SAMPLE) or 0, []).append(sample.name)
        return found

    def masks(self, run: RunFolder) -> list[str]:
        """Return the names of the masks that were uploaded for a run; each is a folder of PNG files."""
        folder = run.path / "masks"
        if not folder.is_dir() or folder.is_symlink():
            return []
        return sorted(path.name for path in folder.glob("[!.]*") if path.is_dir() and not path.is_symlink())

    def mask(self, run: RunFolder, name: str) -> Path:
        """Return the folder of a mask by its exact name. Raises RunError when there is none."""
        if name not in self.masks(run):
            raise RunError("there is no such mask")
        return run.path / "masks" / name

    def delete(self, run: RunFolder) -> None:
        """Delete a run folder. Raises RunInUse when a job works in it."""
        self._delete(run, run.path)

    def delete_edit(self, run: RunFolder, name: str) -> None:
        """Delete an edit. Raises RunInUse when a job works in the run."""
        edit = self.edit(run, name)
        assert number_in(edit, EDIT) is not None, "only folders of edits are deleted"
        self._delete(run, edit)

    def _delete(self, run: RunFolder, path: Path) -> None:
        trash = self.root / ".web" / f"deleted-{uuid4().hex}"
        with run.locked():
            path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


@lru_cache(512)
def settings_of(path: Path, _modified: int) -> TuneSettings:
    """Read the settings of a run, once for every change of the file."""
    return RunFolder(path.parent).read_settings()


@lru_cache(4096)
def edit_of(path: Path, _modified: int) -> dict[str, Any]:
    """Read the record of an edit, once for every change of the file."""
    return RunFolder.read_edit(path)


@lru_cache(512)
def clip_of(path: Path, _modified: int) -> dict[str, float] | None:
    """Return `frames` and `fps` of a clip; None if it cannot be read."""
    from tuneavideo import video as videos

    try:
        found = videos.probe(path)
    except TuneAVideoError:
        return None
    return {"frames": max(1, round(found.seconds * found.fps)), "fps": found.fps}


def count_steps(run: RunFolder) -> int:
    """Return the number of the last logged step, from the end of the log."""
    last = last_step(run)
    return int(last["number"]) if last else 0


def last_step(run: RunFolder) -> dict[str, Any] | None:
    """Return the last logged step, from the end of the log."""
    from tuneavideo.storage.run_files import parse_line

    try:
        with (run.path / "steps.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    found = [step for line in lines[-3:] if (step := parse_line(line)) and isinstance(step, dict)]
    return found[-1] if found else None
