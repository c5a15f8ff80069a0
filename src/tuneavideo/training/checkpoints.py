"""What tuning leaves behind while it goes on: logged steps, and states to resume from."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tuneavideo.errors import DiskError, RunError
from tuneavideo.method.tuning import Tuning
from tuneavideo.models.adapter import Adapter, kept_tensors
from tuneavideo.progress import Step
from tuneavideo.storage import atomic
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.training import disk_space
from tuneavideo.training.memory import OPTIMIZER_STATE
from tuneavideo.video import AnyVideo

LINE = 250  # bytes of a logged step

logger = logging.getLogger(__name__)


@dataclass
class CheckpointManager:
    """Writes and reads what a run keeps of its tuning."""

    run: RunFolder
    tuning: Tuning
    accelerator: Accelerator
    saved: int = -1

    def resume(self) -> None:
        """Go on from the newest state that is whole; if there is none from the adapter, or from the start."""
        if self.run.is_tuned:
            adapter = Adapter.load(self.run.adapter)
            if missing := sorted(self.tuning.parameters.keys() - adapter.tensors.keys()):
                raise RunError(f"{self.run.path}: its adapter has no {missing[0]} to tune on; start a new run")
            self.tuning.start_from(adapter.tensors, adapter.about["steps"])
            logger.warning(
                "going on from the adapter after step %d; the optimizer's state begins anew", self.tuning.number
            )
        for path in reversed(self.run.checkpoints()):
            if state := _read(path):
                self.tuning.load_state(state)
                self.saved = self.tuning.number
                break
            logger.warning("%s is damaged; going on from the state before it", path)
        if self.accelerator.is_main_process:
            self.run.forget_steps_after(self.tuning.number)

    def log(self, step: Step) -> None:
        values = {"loss": step.loss, "relative_loss": step.relative_loss, "learning_rate": step.learning_rate}
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=step.number)
        if self.accelerator.is_main_process:
            self.run.log_step(dataclasses.asdict(step))

    def checkpoint(self) -> None:
        """Keep the state at hand; older ones go when it is on the disk."""
        if self.accelerator.is_main_process and self.saved != self.tuning.number:
            # Through a file of Python's: of one that PyTorch opens itself, it does not say why writing failed.
            with atomic.replacing(self.run.checkpoint(self.tuning.number)) as draft, draft.open("wb") as file:
                torch.save(self.tuning.state(), file)
            self.run.prune_checkpoints(self.tuning.settings.checkpoints_total_limit)
            self.saved = self.tuning.number

    def forget(self) -> None:
        """Drop the state at hand if it was kept: it has shown to be spoilt."""
        if self.accelerator.is_main_process:
            self.run.checkpoint(self.tuning.number).unlink(missing_ok=True)

    def check_room(self, clip: AnyVideo, moments: Mapping[str, Any]) -> None:
        """Refuse to begin what the disk cannot hold. Raises DiskError, with what is needed and what is there."""
        settings, run = self.tuning.settings, self.run
        count = len(settings.edit) * len(settings.seeds)
        state, adapter = self._state_bytes(), self._adapter_bytes()
        states = 1 + min(settings.checkpoints_total_limit, settings.max_train_steps // settings.checkpointing_steps)
        previews = 1 + settings.max_train_steps // settings.validation_steps if settings.validation_steps else 0
        shown = previews * len(settings.edit)
        beside = disk_space.passing(clip, moments, settings, kept=False)
        edits = disk_space.edits(clip, settings, count)
        inversion = disk_space.inversion(moments, settings) if count else 0
        lasting = (
            disk_space.latents(moments) + disk_space.film(clip) + shown * disk_space.film(clip, columns=2) + adapter
        )
        lasting += disk_space.TEXT * 3 + LINE * settings.max_train_steps
        tuning, editing = states * state + (beside if shown else 0), inversion + edits + (beside if count else 0)
        there = (run.latents, run.source, *run.checkpoints(), *run.samples())
        there = sum(path.stat().st_size for path in there if path.is_file())
        needed, free = lasting + max(tuning, editing) - there, atomic.free(run.path)
        if needed > free:
            size = atomic.size
            videos = disk_space.film(clip) + shown * disk_space.film(clip, columns=2) + edits
            raise DiskError(
                f"{run.path}: tuning needs {size(needed)} ({states} states to resume from of {size(state)}, "
                f"adapter {size(adapter)}, videos {size(videos)}, "
                f"latents {size(disk_space.latents(moments) + inversion)}), {size(free)} are free there; make room, "
                "give --out on another disk, or lower checkpoints_total_limit or the number of edits"
            )

    def _state_bytes(self) -> float:
        """Of one state to resume from."""
        settings, tuning = self.tuning.settings, self.tuning
        learned = sum(parameter.numel() for parameter in tuning.parameters.values())
        remembered = OPTIMIZER_STATE.get(settings.optimizer, 2)
        numbers = learned * (1 + remembered + settings.use_ema)
        tensors = len(tuning.parameters) * (4 + settings.use_ema)  # the optimiser keeps a count of steps, too
        return 4 * numbers + disk_space.TENSOR * tensors + disk_space.TEXT

    def _adapter_bytes(self) -> float:
        """Of the adapter in half precision, with its config."""
        all_of_it = kept_tensors(self.tuning.video.unet, self.tuning.parameters)
        return (
            2 * sum(each.numel() for each in all_of_it.values()) + disk_space.TENSOR * len(all_of_it) + disk_space.TEXT
        )


def _read(path: Path) -> dict[str, Any] | None:
    """A state; None when the file is damaged, of which torch.load notices little: it does not check the zip's sums."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                return None
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, ValueError, RuntimeError, KeyError, zlib.error, zipfile.BadZipFile, pickle.PickleError):
        return None
