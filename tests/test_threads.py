"""Threads of a job: one for a small model on a CPU, and as before when it is done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

from tests.conftest import image_unet, moving_square
from tests.shared.job import BRIEF
from tuneavideo import api
from tuneavideo.errors import RunError
from tuneavideo.models import devices
from tuneavideo.progress import Events, Progress


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Numbers of threads that UNets have had; there are two, and the user has set none."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    seen: set[int] = set()
    hook = register_module_forward_hook(
        lambda module, *_: seen.add(torch.get_num_threads()) if type(module).__name__.startswith("UNet2D") else None
    )
    torch.set_num_threads(2)
    yield seen
    torch.set_num_threads(1)
    hook.remove()


def test_a_small_model_has_one_thread_while_it_computes(threads: set[int], base: Path, tmp_path: Path) -> None:
    run, clip = tmp_path / "run", moving_square(tmp_path / "square.mp4")
    stated = {"video": str(clip), "prompt": "a square", "edit": ("a circle",), "base": str(base), "num_frames": 3}
    between = set()
    for _ in api.Job.tune(api.tune_settings(BRIEF | stated | {"max_train_steps": 2}), out=run):
        between.add(torch.get_num_threads())
    assert (threads, between) == ({1}, {2})
    for job in (api.Job.edit(api.edit_settings({"run": str(run), "prompt": ["a red square"]})),
                api.Job.invert(api.edit_settings({"run": str(run), "prompt": ["a"], "strength": 0.7}))):  # fmt: skip
        threads.clear()
        for _ in job:
            between.add(torch.get_num_threads())
        assert (threads, between, torch.get_num_threads()) == ({1}, {2}, 2)


@pytest.mark.parametrize(
    ("variable", "side", "expected"),
    [(None, 8, 1), (None, 8000, 2), ("OMP_NUM_THREADS", 8, 2), ("MKL_NUM_THREADS", 8, 2)],
)
def test_a_large_model_and_one_whose_user_chose_have_all_threads(
    variable: str | None, side: int, expected: int, threads: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv(variable, "2")

    def work() -> Events:
        yield Progress("tune", torch.get_num_threads())

    (step,) = devices.single_threaded(work(), image_unet(), 8, side, side)
    assert (step.number, torch.get_num_threads()) == (expected, 2)


def test_a_job_that_fails_or_is_closed_leaves_the_threads_as_they_were(
    threads: set[int], base: Path, tmp_path: Path
) -> None:
    clip = moving_square(tmp_path / "square.mp4")
    stated = {"video": str(clip), "prompt": "a square", "base": str(base), "num_frames": 3, "max_train_steps": 3}
    job = api.Job.tune(api.tune_settings(BRIEF | stated), out=tmp_path / "run")
    next(each for each in job if each.step)
    job.close()
    assert torch.get_num_threads() == 2 and list((tmp_path / "run/checkpoints").iterdir())
    with pytest.raises(RunError, match="the loss is"):
        list(api.Job.tune(api.resumed_settings(tmp_path / "run", {"learning_rate": 1e30}), resume=tmp_path / "run"))
    assert torch.get_num_threads() == 2
