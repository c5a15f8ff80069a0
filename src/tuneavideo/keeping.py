"""What tuning leaves behind while it goes on: logged steps, and states to resume from."""

from __future__ import annotations

import dataclasses
import logging
import pickle
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tuneavideo import files
from tuneavideo.adapter import Adapter
from tuneavideo.budget import REMEMBERED
from tuneavideo.errors import DiskError
from tuneavideo.inflate import added_parameters
from tuneavideo.progress import Step
from tuneavideo.runs import RunFolder
from tuneavideo.tuning import Tuning
from tuneavideo.video import Spool, Video

# Of their raw size, clips take less than this when written.
COMPRESSED = 0.25

logger = logging.getLogger(__name__)


@dataclass
class Keeper:
    """Writes and reads what a run keeps of its tuning."""

    run: RunFolder
    tuning: Tuning
    accelerator: Accelerator
    saved: int = -1

    def resume(self) -> None:
        """Go on from the newest state that is whole; if there is none from the adapter, or from the start."""
        if self.run.is_tuned:
            adapter = Adapter.load(self.run.adapter)
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
            with files.replacing(self.run.checkpoint(self.tuning.number)) as draft, draft.open("wb") as file:
                torch.save(self.tuning.state(), file)
            self.run.prune_checkpoints(self.tuning.settings.checkpoints_total_limit)
            self.saved = self.tuning.number

    def forget(self) -> None:
        """Drop the state at hand if it was kept: it has shown to be spoilt."""
        if self.accelerator.is_main_process:
            self.run.checkpoint(self.tuning.number).unlink(missing_ok=True)

    def check_room(self, clip: Video | Spool) -> None:
        """Refuse to begin what the disk cannot hold. Raises DiskError, with what is needed and what is there."""
        settings, tuning = self.tuning.settings, self.tuning
        learned = sum(parameter.numel() for parameter in tuning.parameters.values())
        moved = sum(parameter.numel() for parameter in tuning.optimised.values())
        state = 4 * (moved * (1 + REMEMBERED.get(settings.optimizer, 2)) + learned * settings.use_ema)
        states = 1 + min(settings.checkpoints_total_limit, settings.max_train_steps // settings.checkpointing_steps)
        added = added_parameters(tuning.video.unet)
        adapter = 2 * (learned + sum(added[name].numel() for name in added.keys() - tuning.parameters.keys()))
        previews = 1 + settings.max_train_steps // settings.validation_steps if settings.validation_steps else 0
        clips = 1 + len(settings.edit) * (3 * len(settings.seeds) + 2 * previews)  # an edit is written beside the clip
        videos = COMPRESSED * 3 * clip.frames * clip.height * clip.width * clips
        kept = sum(path.stat().st_size for path in self.run.checkpoints())
        needed, free = states * state + adapter + videos - kept, files.free(self.run.path)
        if needed > free:
            size = files.size
            raise DiskError(
                f"{self.run.path}: tuning needs {size(needed)} ({states} states to resume from of {size(state)}, "
                f"adapter {size(adapter)}, videos {size(videos)}), {size(free)} are free there; make room, give --out "
                "on another disk, or lower checkpoints_total_limit"
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
