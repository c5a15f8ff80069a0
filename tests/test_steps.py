"""Edits with the weights of a step of the tuning, and pictures of edits while they are sampled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import moving_square
from tests.shared.job import BRIEF
from tuneavideo import api
from tuneavideo.errors import RunError
from tuneavideo.progress import Progress
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import Video, read

STEPS = {**BRIEF, "max_train_steps": 4, "validation_steps": 2, "mixed_precision": "no", "formats": ("frames",)}


def frames(edit: Path) -> np.ndarray:
    video = read(edit / "frames")
    assert isinstance(video, Video)
    return video.frames_THWC


@pytest.mark.parametrize("more", [{}, pytest.param({"lora_rank": 2, "use_ema": True}, marks=pytest.mark.long)])
def test_edits_are_made_with_the_weights_of_a_step(base: Path, tmp_path: Path, more: dict[str, object]) -> None:
    clip, place = moving_square(tmp_path / "square.mp4"), tmp_path / "run"
    words = {"edit": ("a circle",), "base": str(base), "keep_weights": True, "learning_rate": 1e-2} | STEPS | more
    settings = api.tune_settings({"video": str(clip), "prompt": "a square", "checkpointing_steps": 3, **words})
    job = api.Job.tune(settings, out=place)
    for each in job:
        if each.step and each.number == 3:
            break
    job.close()
    run = RunFolder(place)
    assert run.weight_steps() == [2, 3], "of a preview and of the checkpoint"
    pictures = list[np.ndarray]()

    def note(each: Progress) -> None:
        if each.stage == "edit" and each.picture:
            pictures.append(each.picture())

    [early] = api.edit(place, "a circle", step=2, progress=note)
    [stopped] = api.edit(place, "a circle", step=3, progress=False)
    assert pictures[0].dtype == np.uint8 and pictures[0].shape[0] * 3 == pictures[0].shape[1], "the clip's three frames"
    assert run.read_edit(early)["tuned_steps"] == 2 and run.read_edit(stopped)["step"] == 3
    assert not np.array_equal(frames(early), frames(stopped)), "they are of different weights"
    with pytest.raises(RunError, match="is not tuned to its end"):
        api.edit(place, "a circle", progress=False)
    api.Job.tune(api.resumed_settings(place, {}), resume=place).run(False)
    assert run.weight_steps() == [2, 4], "checkpoints of a finished run are removed"
    [whole] = [edit for edit in run.whole_edits() if run.read_edit(edit)["tuned_steps"] == 4]
    [last] = api.edit(place, "a circle", step=4, progress=False)
    assert np.array_equal(frames(last), frames(whole)), "the adapter has the weights of the last step"
    [again] = api.edit(place, "a circle", step=2, progress=False)
    assert np.array_equal(frames(again), frames(early))
    with pytest.raises(RunError, match=r"no weights of step 3: those of 2, 4 are there; tune with --keep-weights"):
        api.edit(place, "a circle", step=3, progress=False)
