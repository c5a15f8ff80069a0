"""Files of a run: their paths, reading and writing."""

from __future__ import annotations

import json
import re
import shlex
import traceback
import unicodedata
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from tuneavideo.config import REMOVED, as_yaml, checked, parse_values, parse_yaml
from tuneavideo.errors import DiskError, RunError
from tuneavideo.settings import TuneSettings
from tuneavideo.storage import atomic
from tuneavideo.version import __version__

# Names that the program gives; files of other names are left alone.
EDIT = re.compile(r"(\d{3,})-.+")
CHECKPOINT = re.compile(r"(\d{6,})\.pt")
SAMPLE = re.compile(r"(\d{6,})-.+\.mp4")
WEIGHTS = re.compile(r"(\d{6,})\.safetensors")
INVERSION = re.compile(r"[0-9a-f]{24}\.safetensors")
UNTUNED = {"tuned": "no"}
"""Note in the settings of a run that is edited without tuning."""


def slug(text: str, limit: int = 60) -> str:
    """Return words of a prompt or file name as part of a file name.

    Lower-case letters and digits of any script (Unicode NFC) with hyphens between words, at most `limit` bytes long.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFKC", text).lower())
    plain = "".join(each if unicodedata.category(each)[0] in "LMN" else " " for each in text)
    whole = "-".join(plain.split())
    return whole.encode()[:limit].decode(errors="ignore").rstrip("-") or "untitled"


class FilePath:
    """A path in a run folder, as an attribute of `RunFiles`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: RunFiles, _: type[RunFiles]) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunFiles:
    """The files of one tuned clip; see the table in docs/run-folder.md."""

    path: Path

    settings = FilePath("settings.yaml")
    source = FilePath("source.mp4")
    adapter = FilePath("adapter")
    base = FilePath("base")  # of an adopted run that brought its own base
    scores = FilePath("scores.json")
    error = FilePath("error.txt")
    report = FilePath("report.html")
    sheet = FilePath("edits.png")
    card = FilePath("README.md")
    logs = FilePath("logs")
    latents = FilePath("latents.safetensors")
    _steps = FilePath("steps.jsonl")

    def written_with(self) -> dict[str, str]:
        """Return the `about` of `write_settings`: versions of packages, and the base's fingerprint."""
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
        return checked(TuneSettings, parse_values(TuneSettings, values, str(self.settings)), str(self.settings))

    @property
    def quoted(self) -> str:
        """The path, quoted for a shell."""
        return shlex.quote(str(self.path))

    @property
    def is_tuned(self) -> bool:
        """Whether there is a whole adapter; its config is written last."""
        return (self.adapter / "adapter_config.json").is_file()

    @property
    def is_untuned(self) -> bool:
        """Whether the run is edited without tuning, until it is tuned."""
        return not self.is_tuned and self.settings.is_file() and UNTUNED.items() <= self.written_with().items()

    @property
    def tuned_steps(self) -> int | None:
        """Number of steps that the model of the edits was tuned for; None for an adapter of another program."""
        return self.about.get("steps") if self.is_tuned else 0

    @property
    def about(self) -> dict[str, Any]:
        """The adapter's record of its tuning: `steps` and more; empty without an adapter."""
        config = self.adapter / "adapter_config.json"
        return json.loads(config.read_text(encoding="utf-8")).get("about", {}) if config.is_file() else {}

    def is_finished(self, settings: TuneSettings) -> bool:
        """Return whether the adapter was tuned for at least the settings' number of steps."""
        about = self.about
        if "steps" not in about:
            return self.is_tuned  # of another program
        return about.get("max_train_steps", about["steps"]) >= settings.max_train_steps

    def edited(self) -> set[tuple[str, int]]:
        """Return prompt and seed of the edits that were made with the present adapter."""
        about, made = self.about, map(self.read_edit, self.whole_edits())
        steps = {about.get("steps")} if "max_train_steps" in about else {about.get("steps"), None}
        return {(edit["prompt"], edit["seed"]) for edit in made if edit.get("tuned_steps") in steps}

    def edits(self) -> list[Path]:
        """Return folders with names of edits, oldest first; one without `edit.json` is unfinished, or no edit."""
        folders = [path for path in self.path.glob("edits/*") if number_in(path, EDIT) is not None and path.is_dir()]
        return sorted(folders, key=lambda path: (number_in(path, EDIT), path.name))

    def whole_edits(self) -> list[Path]:
        """Return the folders of the edits that are finished, oldest first."""
        return [edit for edit in self.edits() if (edit / "edit.json").is_file()]

    @staticmethod
    def read_edit(edit: Path) -> dict[str, Any]:
        """Return prompt, seed and settings of an edit. Raises RunError when they are damaged."""
        return _read_json(edit / "edit.json", "prompt", "seed")

    @staticmethod
    def read_clip(edit: Path) -> Path:
        """Return the path of an edit's clip, in the format of the best quality."""
        forms = (edit / "frames", edit / "edit.mp4", edit / "edit.gif")
        return next((form for form in forms if form.exists()), forms[1])

    def read_scores(self) -> dict[str, Any] | None:
        """Return the scores of `tuneavideo evaluate`; None without. Raises RunError when they are damaged."""
        return _read_json(self.scores, "edits", "missing") if self.scores.is_file() else None

    def is_newer(self, edit: Path) -> bool:
        """Return whether an edit was made after the scores were written."""
        return (edit / "edit.json").stat().st_mtime > self.scores.stat().st_mtime

    @property
    def last_error(self) -> str:
        """The line of the error that the last job failed with; empty if it succeeded or was stopped."""
        return self.error.read_text(encoding="utf-8").partition("\n")[0] if self.error.is_file() else ""

    def write_error(self, error: Exception) -> None:
        """Write type, message and traceback of an error, time and version; nothing if the folder cannot be written."""
        message = "; ".join([" ".join(str(error).split()), *getattr(error, "__notes__", ())])
        time = datetime.now(UTC).isoformat(timespec="seconds")
        head = f"{type(error).__name__}: {message}\ntime: {time}\ntuneavideo: {__version__}\n\n"
        with suppress(OSError, DiskError):
            atomic.write(self.error, head + "".join(traceback.format_exception(error)))

    def inversion(self, key: str) -> Path:
        return self.path / "inversion" / f"{key}.safetensors"

    def sample(self, step: int, index: int, prompt: str) -> Path:
        """Return the path of the preview of the edit prompt `index` (from 0) after a step."""
        return self.path / "samples" / f"{step:06d}-{index:02d}-{slug(prompt)}.mp4"

    def samples(self) -> list[Path]:
        """Return the previews, in order of steps."""
        return self._numbered("samples", SAMPLE)

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, oldest first."""
        return self._numbered("checkpoints", CHECKPOINT)

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"{step:06d}.pt"

    def weights(self, step: int) -> Path:
        """Return the path of the trained weights that are kept after a step."""
        return self.path / "weights" / f"{step:06d}.safetensors"

    def weight_steps(self) -> list[int]:
        """Return the steps whose weights exist, in kept weights or in a checkpoint, in order."""
        kept = [number_in(path, WEIGHTS) for path in self._numbered("weights", WEIGHTS)]
        stored = [number_in(path, CHECKPOINT) for path in self.checkpoints()]
        return sorted({step for step in (*kept, *stored) if step})

    @property
    def next_edit(self) -> int:
        """Number of the next edit."""
        return max((number_in(edit, EDIT) or 0 for edit in self.whole_edits()), default=-1) + 1

    @contextmanager
    def new_edit(self, prompt: str, number: int | None = None) -> Generator[tuple[Path, Path], None, None]:
        """Yield a hidden folder to fill, and the folder `edits/<number>-<prompt>` that it becomes on success.

        Args:
            prompt: Prompt of the edit.
            number: Its number; by default the next free one.

        Raises:
            DiskError: The place cannot be written or is full.
        """
        folder, is_given = self.path / "edits", number is not None
        number = self.next_edit if number is None else number
        while not is_given and any(folder.glob(f"{number:03d}-*")):  # of an edit that an older version left unfinished
            number += 1
        path = folder / f"{number:03d}-{slug(prompt)}"
        with atomic.replacing(path) as draft:
            draft.mkdir()
            yield draft, path

    def steps(self) -> list[dict[str, Any]]:
        """Return the logged steps, in order; a line cut short by a crash is left out."""
        lines = self._steps.read_text(encoding="utf-8").splitlines() if self._steps.is_file() else []
        return [step for line in lines if (step := parse_line(line)) is not None]

    def log_step(self, step: dict[str, Any]) -> None:
        with self._steps.open("a", encoding="utf-8") as file:
            file.write(json.dumps(step) + "\n")

    def _numbered(self, folder: str, name: re.Pattern[str]) -> list[Path]:
        """Return the files in a folder with names of a pattern, in order of their numbers."""
        found = [
            path for path in (self.path / folder).glob("*") if number_in(path, name) is not None and path.is_file()
        ]
        return sorted(found, key=lambda path: (number_in(path, name), path.name))


def number_in(path: Path, name: re.Pattern[str]) -> int | None:
    found = name.fullmatch(path.name)
    return int(found[1]) if found else None


def _read_json(path: Path, *keys: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); move it away") from error
    if not isinstance(found, dict) or not {*keys} <= found.keys():
        raise RunError(f"{path} is damaged: expected {' and '.join(keys)} in it; move it away")
    return found


def parse_line(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
