"""RunFolder: names, writes and reads every file of a run. Nobody else joins its paths."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import unicodedata
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tuneavideo import files
from tuneavideo.errors import RunError
from tuneavideo.settings import TuneSettings, as_yaml, checked, read_yaml

LOCK = ".lock"


def slug(text: str, limit: int = 60) -> str:
    """Words of a prompt or file name as part of a file name: lower-case letters, digits and hyphens."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:limit].rstrip("-") or "untitled"


@dataclass(frozen=True)
class RunFolder:
    """The folder of one tuned clip; see the table in docs/runs.md."""

    path: Path

    @classmethod
    def create(cls, clip: str, out: Path | str | None = None, root: Path | str = "runs") -> RunFolder:
        """A new folder: `out`, which must not hold anything yet, or the next free `<root>/<clip>-<n>`.

        Raises:
            RunError: `out` holds something.
            DiskError: The place cannot be written.
        """
        path = Path(root if out is None else out)
        with files.told(path):
            path.mkdir(parents=True, exist_ok=True)
            if out is not None:
                if any(file.name != LOCK and file.suffix != files.PART for file in path.iterdir()):
                    run = f", or --resume {cls(path).quoted}" if cls(path).settings.is_file() else ""
                    raise RunError(f"{path} exists and is not empty; give another --out{run}")
                return cls(path)
            number = 1
            while True:
                path = Path(root) / f"{slug(Path(clip).stem)}-{number}"
                try:
                    path.mkdir()
                    return cls(path)
                except FileExistsError:
                    number += 1

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """A folder that `create` made. Raises RunError when it is none."""
        run = cls(Path(path))
        if not run.settings.is_file():
            raise RunError(f"{path} is no run folder: {run.settings.name} is missing; 'tuneavideo tune' makes one")
        return run

    @contextmanager
    def locked(self) -> Generator[None, None, None]:
        """Keep other processes out, and clear away what a killed one has left unfinished.

        The lock is the operating system's: it ends with the process, however that ends.

        Raises:
            RunError: Another process works in the folder.
            DiskError: The place cannot be written.
        """
        lock = FileLock(self.path / LOCK, timeout=0, thread_local=False)  # a job may be closed in another thread
        try:
            with files.told(self.path):
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

    def remove(self) -> None:
        """Leave nothing of a run that has not begun."""
        shutil.rmtree(self.path, ignore_errors=True)

    def written_with(self) -> dict[str, str]:
        """The `about` of `write_settings`: versions of packages, and the base's fingerprint."""
        lines = self.settings.read_text(encoding="utf-8").splitlines()
        notes = takewhile(lambda line: line.startswith("# "), lines)
        return dict(note[2:].split(": ", 1) for note in notes if ": " in note)

    def write_settings(self, settings: TuneSettings, about: dict[str, Any]) -> None:
        """The first file of a run: resolved settings, and as comments what they were resolved with."""
        notes = "".join(f"# {name}: {value}\n" for name, value in about.items())
        files.write(self.settings, notes + as_yaml(settings))

    def read_settings(self) -> TuneSettings:
        """The settings the run was made with."""
        return checked(TuneSettings, read_yaml(self.settings, TuneSettings), str(self.settings))

    @property
    def quoted(self) -> str:
        """The folder as a shell takes it."""
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
    def is_tuned(self) -> bool:
        """Whether there is a whole adapter; its config is written last."""
        return (self.adapter / "adapter_config.json").is_file()

    def edited(self) -> set[tuple[str, int]]:
        """Prompt and seed of the edits that are there."""
        made = map(self.read_edit, self.whole_edits())
        return {(edit["prompt"], edit["seed"]) for edit in made}

    def edits(self) -> list[Path]:
        """Folders of the edits, oldest first; one whose `edit.json` is not there yet is unfinished."""
        return sorted(path for path in self.path.glob("edits/[0-9][0-9][0-9]-*") if path.is_dir())

    def whole_edits(self) -> list[Path]:
        """Folders of the edits that are finished, oldest first."""
        return [edit for edit in self.edits() if (edit / "edit.json").is_file()]

    @staticmethod
    def read_edit(edit: Path) -> dict[str, Any]:
        """Prompt, seed and settings of an edit."""
        return json.loads((edit / "edit.json").read_text(encoding="utf-8"))

    @staticmethod
    def clip_of(edit: Path) -> Path:
        """An edit's clip in the form that lost least."""
        forms = (edit / "frames", edit / "edit.mp4", edit / "edit.gif")
        return next((form for form in forms if form.exists()), forms[1])

    @property
    def scores(self) -> Path:
        return self.path / "scores.json"

    def read_scores(self) -> dict[str, Any] | None:
        """What `tuneavideo evaluate` wrote; None if it has not."""
        return json.loads(self.scores.read_text(encoding="utf-8")) if self.scores.is_file() else None

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

    def sample(self, step: int, prompt: str) -> Path:
        return self.path / "samples" / f"{step:06d}-{slug(prompt)}.mp4"

    def checkpoints(self) -> list[Path]:
        """States to resume from, oldest first."""
        return sorted(path for path in (self.path / "checkpoints").glob("[0-9]*") if path.suffix == ".pt")

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"{step:06d}.pt"

    def prune_checkpoints(self, keep: int) -> None:
        for path in self.checkpoints()[:-keep]:
            path.unlink()

    def drop_checkpoints(self) -> None:
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    def new_edit(self, prompt: str) -> Path:
        """A new folder `edits/<number>-<prompt>`."""
        (self.path / "edits").mkdir(exist_ok=True)
        taken = [int(path.name[:3]) for path in (self.path / "edits").glob("[0-9][0-9][0-9]-*")]
        path = self.path / "edits" / f"{max(taken, default=-1) + 1:03d}-{slug(prompt)}"
        path.mkdir()
        return path

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
        files.write(self._steps, "".join(kept))
        for sample in (self.path / "samples").glob("[0-9]*"):
            if int(sample.name.split("-")[0]) > number:
                sample.unlink()

    def _clear(self) -> None:
        files.sweep(self.path)
        for edit in (self.path / "edits").glob("[0-9]*"):
            if not (edit / "edit.json").is_file():  # it is written last
                shutil.rmtree(edit)
        if self.is_tuned:
            self.drop_checkpoints()

    @property
    def _steps(self) -> Path:
        return self.path / "steps.jsonl"


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
