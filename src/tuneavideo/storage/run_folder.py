"""The run folder: paths, reading and writing of every file of a run."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tuneavideo.config import REMOVED, as_yaml, checked, parse_yaml, stated_values
from tuneavideo.errors import DiskError, RunError
from tuneavideo.settings import TuneSettings
from tuneavideo.storage import atomic

LOCK = ".lock"
# What to do about a run folder that cannot be made, and about one that cannot be written.
OTHER_PLACE = "choose another place with --out"
COPY = "make the folder writable, or copy the run and work on the copy"
NEW, MADE = ".new", "folder"
ASKED = ".edits.json"


def slug(text: str, limit: int = 60) -> str:
    """Words of a prompt or file name as part of a file name.

    Lower-case letters and digits of any script (Unicode NFC) with hyphens between words, at most `limit` bytes long.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFKC", text).lower())
    plain = "".join(each if unicodedata.category(each)[0] in "LMN" else " " for each in text)
    whole = "-".join(plain.split())
    return whole.encode()[:limit].decode(errors="ignore").rstrip("-") or "untitled"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one tuned clip; see the table in docs/run-folder.md."""

    path: Path

    @classmethod
    def create(cls, clip: str, out: Path | str | None = None, root: Path | str = "runs") -> RunFolder:
        """Create a folder: `out`, which must be empty, or the next free `<root>/<clip>-<n>`.

        Raises:
            RunError: `out` holds something.
            DiskError: The place cannot be written.
        """
        path = Path(root if out is None else out)
        with atomic.disk_errors(path, advice=OTHER_PLACE):
            if out is not None:
                made = not path.exists()
                path.mkdir(parents=True, exist_ok=True)
                cls.check_free(path)
                return cls(path)._begun(made)
            path.mkdir(parents=True, exist_ok=True)
            number = 1
            while True:
                path = Path(root) / f"{slug(Path(clip).stem)}-{number}"
                try:
                    path.mkdir()
                    return cls(path)._begun(True)
                except FileExistsError:
                    number += 1

    @classmethod
    def check_free(cls, path: Path | str) -> None:
        """Raise RunError when a folder holds something already."""
        path = Path(path)
        if path.is_dir() and not all(file.name in (LOCK, NEW) or atomic.is_draft(file) for file in path.iterdir()):
            resume = f"tuneavideo tune --resume {cls(path).quoted}"
            how = f", or go on with: {resume}" if cls(path).settings.is_file() else ""
            raise RunError(f"{path} exists and is not empty; give another --out{how}")

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Return the folder of an existing run. Raises RunError when it is none."""
        run = cls(Path(path))
        if not run.settings.is_file():
            around = next((each for each in run.path.parents if cls(each).settings.is_file()), None)
            found = f"{run.settings.name} is missing" if run.path.exists() else "it does not exist"
            advice = f"it belongs to the run {around}" if around else "'tuneavideo tune' makes one"
            raise RunError(f"{path} is no run folder: {found}; {advice}")
        return run

    @contextmanager
    def locked(self) -> Generator[None, None, None]:
        """Lock the folder against other processes, and remove unfinished files of killed ones.

        The lock is the operating system's: it ends with the process, however that ends.

        Raises:
            RunError: Another process works in the folder.
            DiskError: The place cannot be written.
        """
        lock = FileLock(self.path / LOCK, timeout=0, thread_local=False)  # a job may be closed in another thread
        try:
            with atomic.disk_errors(self.path, advice=COPY):
                lock.acquire()
        except Timeout:
            raise RunError(
                f"{self.path} is in use: another process tunes or edits there; wait until it is done, or stop it"
            ) from None
        try:
            self._clear()
            yield
        finally:
            lock.release()

    @contextmanager
    def present(self) -> Generator[None, None, None]:
        """Raise RunError when the folder is deleted or moved within the block."""
        try:
            yield
        except (FileNotFoundError, DiskError) as error:
            if self.settings.is_file():
                raise
            raise RunError(
                f"{self.path} was deleted or moved while it was in use; if it was moved, go on with: "
                "tuneavideo tune --resume NEW_PLACE"
            ) from error

    @property
    def is_new(self) -> bool:
        """Return whether the run was created and holds no results yet."""
        return (self.path / NEW).is_file()

    def keep(self) -> None:
        """Remove the file that marks a new run."""
        (self.path / NEW).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the files of a run that `is_new`; of any other, and of files that others put there, nothing."""
        if not self.is_new or self.is_tuned or self.steps() or self.checkpoints():
            return
        made = (self.path / NEW).read_text(encoding="utf-8") == MADE
        weights = self.adapter / "adapter.safetensors"  # without its config it is no adapter
        for file in (self.source, self.latents, self._steps, weights, self.settings, self.path / LOCK, self.path / NEW):
            file.unlink(missing_ok=True)
        _remove_if_empty(self.adapter)
        if made:
            _remove_if_empty(self.path)

    def written_with(self) -> dict[str, str]:
        """The `about` of `write_settings`: versions of packages, and the base's fingerprint."""
        lines = self.settings.read_text(encoding="utf-8").splitlines()
        notes = takewhile(lambda line: line.startswith("# "), lines)
        return dict(note[2:].split(": ", 1) for note in notes if ": " in note)

    def write_settings(self, settings: TuneSettings, about: dict[str, Any]) -> None:
        """Write the resolved settings, with package versions and the base's fingerprint as comments."""
        notes = "".join(f"# {name}: {value}\n" for name, value in about.items())
        atomic.write(self.settings, notes + as_yaml(settings))

    def read_settings(self) -> TuneSettings:
        """Read the settings of the run; of a tuned one without those that later versions removed."""
        values = parse_yaml(self.settings)
        if self.is_tuned:
            values = {name: value for name, value in values.items() if name not in REMOVED}
        return checked(TuneSettings, stated_values(TuneSettings, values, str(self.settings)), str(self.settings))

    @property
    def quoted(self) -> str:
        """The path, quoted for a shell."""
        return shlex.quote(str(self.path))

    @property
    def settings(self) -> Path:
        return self.path / "settings.yaml"

    @property
    def source(self) -> Path:
        return self.path / "source.mp4"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def base(self) -> Path:
        """The base of an adopted run that brought its own."""
        return self.path / "base"

    @property
    def is_tuned(self) -> bool:
        """Whether there is a whole adapter; its config is written last."""
        return (self.adapter / "adapter_config.json").is_file()

    @property
    def about(self) -> dict[str, Any]:
        """What the adapter's config tells of its tuning: `steps` and more; empty without an adapter."""
        config = self.adapter / "adapter_config.json"
        return json.loads(config.read_text(encoding="utf-8")).get("about", {}) if config.is_file() else {}

    def is_finished(self, settings: TuneSettings) -> bool:
        """Return whether the adapter was tuned for at least the settings' number of steps."""
        about = self.about
        if "steps" not in about:
            return self.is_tuned  # of another program
        return about.get("max_train_steps", about["steps"]) >= settings.max_train_steps

    def require_tuned(self) -> None:
        """Raise RunError when there is no whole adapter."""
        if not self.is_tuned:
            raise RunError(f"{self.path} is not tuned to its end; go on with: tuneavideo tune --resume {self.quoted}")

    def edited(self) -> set[tuple[str, int]]:
        """Prompt and seed of the edits that the adapter made as it is now."""
        about, made = self.about, map(self.read_edit, self.whole_edits())
        steps = {about.get("steps")} if "max_train_steps" in about else {about.get("steps"), None}
        return {(edit["prompt"], edit["seed"]) for edit in made if edit.get("tuned_steps") in steps}

    def made_of(self, asked: dict[str, Any]) -> set[tuple[str, int]]:
        """Prompt and seed of the edits that a command which asked for the same made before it was stopped."""
        note = self.path / ASKED
        before = _parsed(note.read_text(encoding="utf-8")) if note.is_file() else None
        if not before or before["asked"] != self._noted(asked):
            return set()
        later = [edit for edit in self.whole_edits() if (_number(edit, _EDIT) or 0) >= before["first"]]
        return {(edit["prompt"], edit["seed"]) for edit in map(self.read_edit, later)}

    def begin_edits(self, asked: dict[str, Any]) -> None:
        """Note what a command asks for, unless there is a note of one that goes on."""
        if not self.made_of(asked):
            note = {"asked": self._noted(asked), "first": self.next_edit}
            atomic.write(self.path / ASKED, json.dumps(note))

    def end_edits(self) -> None:
        """Forget what was asked for: all of it is made."""
        (self.path / ASKED).unlink(missing_ok=True)

    def _noted(self, asked: dict[str, Any]) -> dict[str, Any]:
        return json.loads(json.dumps(asked | {"tuned_steps": self.about.get("steps")}))

    def edits(self) -> list[Path]:
        """Folders named as edits are, oldest first; one without `edit.json` is unfinished, or no edit."""
        folders = [path for path in self.path.glob("edits/*") if _number(path, _EDIT) is not None and path.is_dir()]
        return sorted(folders, key=lambda path: (_number(path, _EDIT), path.name))

    def whole_edits(self) -> list[Path]:
        """Folders of the edits that are finished, oldest first."""
        return [edit for edit in self.edits() if (edit / "edit.json").is_file()]

    @staticmethod
    def read_edit(edit: Path) -> dict[str, Any]:
        """Prompt, seed and settings of an edit. Raises RunError when they are damaged."""
        return _read_json(edit / "edit.json", "prompt", "seed")

    @staticmethod
    def read_clip(edit: Path) -> Path:
        """An edit's clip in the form that lost least."""
        forms = (edit / "frames", edit / "edit.mp4", edit / "edit.gif")
        return next((form for form in forms if form.exists()), forms[1])

    @property
    def scores(self) -> Path:
        return self.path / "scores.json"

    def read_scores(self) -> dict[str, Any] | None:
        """What `tuneavideo evaluate` wrote; None if it has not. Raises RunError when it is damaged."""
        return _read_json(self.scores, "edits", "missing") if self.scores.is_file() else None

    def is_newer(self, edit: Path) -> bool:
        """Whether an edit was made after the scores were written."""
        return (edit / "edit.json").stat().st_mtime > self.scores.stat().st_mtime

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def sheet(self) -> Path:
        return self.path / "edits.png"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def inversion(self, key: str) -> Path:
        return self.path / "inversion" / f"{key}.safetensors"

    @property
    def latents(self) -> Path:
        return self.path / "latents.safetensors"

    def sample(self, step: int, index: int, prompt: str) -> Path:
        """The preview of the edit prompt `index` (from 0) after a step."""
        return self.path / "samples" / f"{step:06d}-{index:02d}-{slug(prompt)}.mp4"

    def samples(self) -> list[Path]:
        """Previews, in order of steps."""
        return self._numbered("samples", _SAMPLE)

    def checkpoints(self) -> list[Path]:
        """States to resume from, oldest first."""
        return self._numbered("checkpoints", _CHECKPOINT)

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"{step:06d}.pt"

    def prune_checkpoints(self, keep: int) -> None:
        for path in self.checkpoints()[:-keep]:
            path.unlink()

    def drop_checkpoints(self) -> None:
        """Remove the states of steps that are in the adapter."""
        done = self.about.get("steps", 0)
        for path in self.checkpoints():
            if (_number(path, _CHECKPOINT) or 0) <= done:
                path.unlink()
        _remove_if_empty(self.path / "checkpoints")

    @property
    def next_edit(self) -> int:
        """The number of the next edit."""
        return max((_number(edit, _EDIT) or 0 for edit in self.whole_edits()), default=-1) + 1

    @contextmanager
    def new_edit(self, prompt: str) -> Generator[tuple[Path, Path], None, None]:
        """A hidden folder to fill, and the folder `edits/<number>-<prompt>` that it becomes when the block ends well.

        Raises:
            DiskError: The place cannot be written or is full.
        """
        number, folder = self.next_edit, self.path / "edits"
        while any(folder.glob(f"{number:03d}-*")):  # of an edit that an older version left unfinished
            number += 1
        path = folder / f"{number:03d}-{slug(prompt)}"
        with atomic.replacing(path) as draft:
            draft.mkdir()
            yield draft, path

    def steps(self) -> list[dict[str, Any]]:
        """What `log_step` wrote, in order of steps; a line cut short by a crash is left out."""
        lines = self._steps.read_text(encoding="utf-8").splitlines() if self._steps.is_file() else []
        return [step for line in lines if (step := _parsed(line)) is not None]

    def log_step(self, step: dict[str, Any]) -> None:
        with self._steps.open("a", encoding="utf-8") as file:
            file.write(json.dumps(step) + "\n")

    def forget_steps_after(self, number: int) -> None:
        """Drop logged steps, and previews of them, that a resumed tuning will do again."""
        kept = [json.dumps(step) + "\n" for step in self.steps() if step["number"] <= number]
        atomic.write(self._steps, "".join(kept))
        for sample in self.samples():
            if (_number(sample, _SAMPLE) or 0) > number:
                sample.unlink()

    def _begun(self, made: bool) -> RunFolder:
        """Mark a new run, and whether its folder was `made` for it."""
        if not self.is_new:
            (self.path / NEW).write_text(MADE if made else "", encoding="utf-8")
        return self

    def _clear(self) -> None:
        atomic.sweep(self.path)
        if self.is_tuned:
            self.keep()
            self.drop_checkpoints()

    def _numbered(self, folder: str, name: re.Pattern[str]) -> list[Path]:
        """Files in a folder with names of a pattern, in order of their numbers."""
        found = [path for path in (self.path / folder).glob("*") if _number(path, name) is not None and path.is_file()]
        return sorted(found, key=lambda path: (_number(path, name), path.name))

    @property
    def _steps(self) -> Path:
        return self.path / "steps.jsonl"


# Names that the program gives; others are not its own, and are left alone.
_EDIT = re.compile(r"(\d{3,})-.+")
_CHECKPOINT = re.compile(r"(\d{6,})\.pt")
_SAMPLE = re.compile(r"(\d{6,})-.+\.mp4")


def _number(path: Path, name: re.Pattern[str]) -> int | None:
    found = name.fullmatch(path.name)
    return int(found[1]) if found else None


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _read_json(path: Path, *keys: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); move it away") from error
    if not isinstance(found, dict) or not {*keys} <= found.keys():
        raise RunError(f"{path} is damaged: expected {' and '.join(keys)} in it; move it away")
    return found


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
