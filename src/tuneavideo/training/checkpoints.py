"""Checkpoints and logged steps of a tuning."""

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
from torch import Tensor

from tuneavideo.errors import DiskError, RunError
from tuneavideo.method.tuning import Tuning
from tuneavideo.models.adapter import Adapter, kept_tensors
from tuneavideo.progress import Step
from tuneavideo.storage import atomic, cache
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.training import disk_space
from tuneavideo.training.memory import OPTIMIZER_STATE
from tuneavideo.video import AnyVideo

LINE = 250  # bytes of a logged step

logger = logging.getLogger(__name__)


@dataclass
class CheckpointManager:
    """Checkpoint manager: writes and reads what a run keeps of its tuning."""

    run: RunFolder
    tuning: Tuning
    accelerator: Accelerator
    saved: int = -1

    def resume(self) -> None:
        """Continue from the newest checkpoint that is whole, else from the adapter, else from the start."""
        if self.run.is_tuned:
            adapter = Adapter.load(self.run.adapter)
            if missing := sorted(self.tuning.parameters.keys() - adapter.tensors.keys()):
                raise RunError(f"{self.run.path}: its adapter has no {missing[0]} to tune on; start a new run")
            self.tuning.start_from(adapter.tensors, adapter.about["steps"])
            logger.warning("continuing from the adapter after step %d with a new optimizer state", self.tuning.number)
        for path in reversed(self.run.checkpoints()):
            if state := _read(path):
                self.tuning.load_state(state)
                self.saved = self.tuning.number
                break
            logger.warning("%s is damaged; continuing from the checkpoint before it", path)
        if self.accelerator.is_main_process:
            self.run.forget_steps_after(self.tuning.number)

    def log(self, step: Step) -> None:
        values = {"loss": step.loss, "relative_loss": step.relative_loss, "learning_rate": step.learning_rate}
        self.accelerator.log({name: value for name, value in values.items() if value is not None}, step=step.number)
        if self.accelerator.is_main_process:
            self.run.log_step(dataclasses.asdict(step))

    def checkpoint(self) -> None:
        """Write a checkpoint of the current step, and delete older ones beyond the limit."""
        if self.accelerator.is_main_process and self.saved != self.tuning.number:
            # Through a Python file: of one that it opens itself PyTorch does not report why a write failed.
            with atomic.replacing(self.run.checkpoint(self.tuning.number)) as draft, draft.open("wb") as file:
                torch.save(self.tuning.state(), file)
            self.run.prune_checkpoints(self.tuning.settings.checkpoints_total_limit)
            self.saved = self.tuning.number

    def keep_weights(self) -> None:
        """Write the trained weights of the current step in half precision, unless they are there."""
        path = self.run.weights(self.tuning.number)
        if self.accelerator.is_main_process and cache.read(path) is None:
            cache.write(path, {name: each.half() for name, each in self.tuning.learned().items()})

    def forget(self) -> None:
        """Delete the checkpoint of the current step, whose loss is not finite."""
        if self.accelerator.is_main_process:
            self.run.checkpoint(self.tuning.number).unlink(missing_ok=True)

    def check_room(self, clip: AnyVideo, moments: Mapping[str, Any]) -> None:
        """Raise DiskError, with the bytes needed and free, when the disk cannot hold the run."""
        settings, run = self.tuning.settings, self.run
        count = len(settings.edit) * len(settings.seeds)
        state, adapter = self._state_bytes(), self._adapter_bytes()
        states = 1 + min(settings.checkpoints_total_limit, settings.max_train_steps // settings.checkpointing_steps)
        previews = 1 + settings.max_train_steps // settings.validation_steps if settings.validation_steps else 0
        shown = previews * len(settings.edit)
        temporary = disk_space.temporary(clip, moments, settings, kept=False)
        edits = disk_space.edits(clip, settings, count)
        inversion = disk_space.inversion(moments, settings) if count else 0
        lasting = (
            disk_space.latents(moments) + disk_space.video(clip) + shown * disk_space.video(clip, columns=2) + adapter
        )
        lasting += (
            disk_space.TEXT * 3 + LINE * settings.max_train_steps + (previews * adapter if settings.keep_weights else 0)
        )
        tuning, editing = states * state + (temporary if shown else 0), inversion + edits + (temporary if count else 0)
        present = (run.latents, run.source, *run.checkpoints(), *run.samples())
        present = sum(path.stat().st_size for path in present if path.is_file())
        needed, free = lasting + max(tuning, editing) - present, atomic.free(run.path)
        if needed > free:
            size = atomic.size
            videos = disk_space.video(clip) + shown * disk_space.video(clip, columns=2) + edits
            raise DiskError(
                f"{run.path}: tuning needs {size(needed)} ({states} checkpoints of {size(state)}, "
                f"adapter {size(adapter)}, videos {size(videos)}, "
                f"latents {size(disk_space.latents(moments) + inversion)}), {size(free)} are free there; make room, "
                "give --out on another disk, or lower checkpoints_total_limit or the number of edits"
            )

    def _state_bytes(self) -> float:
        """Estimate the bytes of a checkpoint."""
        settings, tuning = self.tuning.settings, self.tuning
        trainable = sum(parameter.numel() for parameter in tuning.parameters.values())
        numbers = trainable * (1 + OPTIMIZER_STATE.get(settings.optimizer, 2) + settings.use_ema)
        tensors = len(tuning.parameters) * (4 + settings.use_ema)  # the optimizer has a count of steps, too
        return 4 * numbers + disk_space.TENSOR * tensors + disk_space.TEXT

    def _adapter_bytes(self) -> float:
        """Estimate the bytes of the adapter in half precision, with its config."""
        tensors = kept_tensors(self.tuning.video.unet, self.tuning.parameters)
        return 2 * sum(each.numel() for each in tensors.values()) + disk_space.TENSOR * len(tensors) + disk_space.TEXT


def read_weights(run: RunFolder, step: int) -> dict[str, Tensor]:
    """Return the trained weights of a step, averaged ones if EMA is on. Raises RunError when they are damaged."""
    if kept := cache.read(run.weights(step)):
        return kept
    state = _read(run.checkpoint(step))
    if state is None:
        raise RunError(f"{run.path}: the weights of step {step} are damaged; take another step")
    names, ema = state["parameters"], state["ema"]
    return dict(zip(names, ema["shadow_params"], strict=True)) if ema else names


def _read(path: Path) -> dict[str, Any] | None:
    """Read a checkpoint; None when it is damaged. torch.load does not verify the zip's checksums."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():
                return None
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, ValueError, RuntimeError, KeyError, zlib.error, zipfile.BadZipFile, pickle.PickleError):
        return None
