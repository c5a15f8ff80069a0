"""The run folder: creation, lock, removal and what a job continues."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tuneavideo.errors import DiskError, RunError, RunInUse
from tuneavideo.storage import atomic
from tuneavideo.storage.run_files import (
    CHECKPOINT,
    EDIT,
    INVERSION,
    SAMPLE,
    WEIGHTS,
    RunFiles,
    number_in,
    parse_line,
    slug,
)

LOCK = ".lock"
# Advice for a run folder that cannot be created, and for one that cannot be written.
OTHER_PLACE = "choose another place with --out"
COPY = "make the folder writable, or copy the run and work on the copy"
NEW, MADE = ".new", "folder"
REQUEST = ".edits.json"


class RunFolder(RunFiles):
    """The folder of one tuned clip, which one process at a time works in."""

    @classmethod
    def create(cls, clip: str, out: Path | str | None = None, root: Path | str = "runs") -> RunFolder:
        """Create a run folder.

        Args:
            clip: Path of the clip, whose name the folder gets.
            out: Folder to create, or an empty one. None: the next free `<root>/<clip>-<n>`.
            root: Parent folder without `out`.

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
        """Raise RunError when a folder holds files already."""
        path = Path(path)
        if path.is_dir() and not all(file.name in (LOCK, NEW) or atomic.is_draft(file) for file in path.iterdir()):
            resume = f"tuneavideo tune --resume {cls(path).quoted}"
            how = f", or go on with: {resume}" if cls(path).settings.is_file() else ""
            raise RunError(f"{path} exists and is not empty; give another --out{how}")

    @classmethod
    def open(cls, path: Path | str) -> RunFolder:
        """Return the folder of an existing run. Raises RunError for any other folder."""
        run = cls(Path(path))
        if not run.settings.is_file():
            around = next((each for each in run.path.parents if cls(each).settings.is_file()), None)
            found = f"{run.settings.name} is missing" if run.path.exists() else "it does not exist"
            found += f" ({run.last_error})" if run.last_error else ""
            advice = f"it belongs to the run {around}" if around else "'tuneavideo tune' makes one"
            raise RunError(f"{path} is no run folder: {found}; {advice}")
        return run

    @contextmanager
    def locked(self) -> Generator[None, None, None]:
        """Lock the folder against other processes, and remove unfinished files of killed ones.

        The lock is the operating system's: it ends with the process, however that ends.

        Raises:
            RunInUse: Another process has the lock.
            DiskError: The place cannot be written.
        """
        lock = FileLock(self.path / LOCK, timeout=0.2, thread_local=False)  # a job may be closed in another thread
        try:
            with atomic.disk_errors(self.path, advice=COPY):
                lock.acquire()
        except Timeout:
            raise RunInUse(
                f"{self.path} is in use: another process tunes or edits there; wait until it is done, or stop it"
            ) from None
        try:
            self._clear()
            yield
        finally:
            lock.release()

    @property
    def is_in_use(self) -> bool:
        """Whether a process works in the folder; it is locked for microseconds to find out."""
        if not (self.path / LOCK).is_file():
            return False
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except (Timeout, OSError):
            return True
        lock.release()
        return False

    @contextmanager
    def job(self, step: int | None = None) -> Generator[None, None, None]:
        """Lock a run that can be edited for a job; write its error to `error.txt`, which a success removes.

        Args:
            step: Step of the tuning whose weights the job needs. None: the adapter.

        Raises:
            RunError: Another process has the lock, the weights are missing, or the folder is deleted or moved
                meanwhile.
            DiskError: The place cannot be written.
        """
        with self.locked():
            self.require_model(step)
            try:
                with self.present():
                    yield
            except Exception as error:
                if self.settings.is_file():
                    self.write_error(error)
                raise
            self.error.unlink(missing_ok=True)

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
        """Whether the run was created and holds no results yet."""
        return (self.path / NEW).is_file()

    def keep(self) -> None:
        """Remove the file `.new`."""
        (self.path / NEW).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the files of a run that `is_new`, but no files of others; do nothing to any other run."""
        if not self.is_new or self.is_tuned or self.steps() or self.checkpoints():
            return
        made = (self.path / NEW).read_text(encoding="utf-8") == MADE
        weights = self.adapter / "adapter.safetensors"  # without its config it is no adapter
        files = (self.source, self.latents, self._steps, weights, self.error, self.settings)
        for file in (*files, self.path / LOCK, self.path / NEW):
            file.unlink(missing_ok=True)
        _remove_if_empty(self.adapter)
        if made:
            _remove_if_empty(self.path)

    def edits_of(self, request: dict[str, Any]) -> set[tuple[str, int]]:
        """Return prompt and seed of the edits that a stopped command with the same `request` made."""
        file = self.path / REQUEST
        before = parse_line(file.read_text(encoding="utf-8")) if file.is_file() else None
        if not before or before["asked"] != self._recorded(request):
            return set()
        later = [edit for edit in self.whole_edits() if (number_in(edit, EDIT) or 0) >= before["first"]]
        return {(edit["prompt"], edit["seed"]) for edit in map(self.read_edit, later)}

    def begin_edits(self, request: dict[str, Any]) -> None:
        """Record the request of a command, unless it continues a stopped one."""
        if not self.edits_of(request):
            record = {"asked": self._recorded(request), "first": self.next_edit}
            atomic.write(self.path / REQUEST, json.dumps(record))

    def end_edits(self) -> None:
        """Remove the record of the request: all its edits are made."""
        (self.path / REQUEST).unlink(missing_ok=True)

    def _recorded(self, request: dict[str, Any]) -> dict[str, Any]:
        return json.loads(json.dumps(request | {"tuned_steps": self.tuned_steps}))

    def require_model(self, step: int | None = None) -> None:
        """Raise RunError when the weights of a step are missing; without `step` when there is no whole adapter.

        A run that is edited without tuning needs none.
        """
        if step is not None:
            if step not in (known := self.weight_steps()):
                found = f"those of {', '.join(map(str, known))} are there" if known else "none are kept"
                advice = "tune with --keep-weights and --validation-steps"
                raise RunError(f"{self.path} has no weights of step {step}: {found}; {advice}")
            return
        if not (self.is_tuned or self.is_untuned):
            failed = f" ({self.last_error})" if self.last_error else ""
            raise RunError(
                f"{self.path} is not tuned to its end{failed}; go on with: tuneavideo tune --resume {self.quoted}"
            )

    def drop_checkpoints(self) -> None:
        """Remove the checkpoints of steps that are in the adapter."""
        done = self.about.get("steps", 0)
        for path in self.checkpoints():
            if (number_in(path, CHECKPOINT) or 0) <= done:
                path.unlink()
        _remove_if_empty(self.path / "checkpoints")

    def drop_inversions(self) -> None:
        """Remove the inversions, which an earlier model made."""
        for path in (self.path / "inversion").glob("*"):
            if INVERSION.fullmatch(path.name):
                path.unlink()

    def forget_steps_after(self, number: int) -> None:
        """Remove the log, previews and weights of the steps after `number`, which a resumed tuning makes again."""
        kept = [json.dumps(step) + "\n" for step in self.steps() if step["number"] <= number]
        atomic.write(self._steps, "".join(kept))
        for made, name in (*product(self.samples(), [SAMPLE]), *product(self._numbered("weights", WEIGHTS), [WEIGHTS])):
            if (number_in(made, name) or 0) > number:
                made.unlink()

    def prune_checkpoints(self, keep: int) -> None:
        for path in self.checkpoints()[:-keep]:
            path.unlink()

    def _begun(self, made: bool) -> RunFolder:
        """Write `.new`, which records whether the folder was `made` for the run."""
        if not self.is_new:
            (self.path / NEW).write_text(MADE if made else "", encoding="utf-8")
        return self

    def _clear(self) -> None:
        atomic.sweep(self.path)
        if self.is_tuned:
            self.keep()
            self.drop_checkpoints()


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()
