"""Several processes on one clip: the same adapter as one process with as many samples, also after one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.shared.job import BRIEF
from tuneavideo import api
from tuneavideo.storage.run_folder import RunFolder

pytestmark = pytest.mark.long
LAUNCH = "launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"


def launched(*words: str) -> subprocess.Popen:
    """Start `tuneavideo` as two processes that talk by gloo."""
    script = Path(sys.executable).with_name("accelerate")
    whole = [str(script), *LAUNCH.split(), "--main_process_port", "0", "-m", "tuneavideo", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def words_of(clip: Path, base: Path, out: Path, **settings: object) -> list[str]:
    named = {**BRIEF, "max_train_steps": 20, "learning_rate": 1e-4, **settings}
    flags = [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", str(value))
             if not isinstance(value, bool)]  # fmt: skip
    return ["tune", str(clip), "--prompt", "a square", "--base", str(base), "--out", str(out), *flags,
            "--no-gradient-checkpointing", "--mixed-precision", "no"]  # fmt: skip


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return the trained values of the last checkpoint's run, in full precision from its adapter."""
    return load_file(run / "adapter/adapter.safetensors")


def test_twenty_steps_of_two_processes_are_those_of_one_with_twice_the_batch(
    base: Path, clip: Path, tmp_path: Path
) -> None:
    done = launched(*words_of(clip, base, tmp_path / "two"))
    _, errors = done.communicate(timeout=400)
    assert done.returncode == 0, errors
    settings = {**BRIEF, "max_train_steps": 20, "learning_rate": 1e-4, "train_batch_size": 2}
    api.tune(clip, "a square", base=str(base), out=tmp_path / "one", mixed_precision="no", **settings)
    two, one = (RunFolder.open(tmp_path / name).steps() for name in ("two", "one"))
    losses = [(a["loss"], b["loss"]) for a, b in zip(two, one, strict=True)]
    assert len(losses) == 20 and max(abs(a - b) / b for a, b in losses) <= 1e-5
    for (name, a), b in zip(tensors(tmp_path / "two").items(), tensors(tmp_path / "one").values(), strict=True):
        assert (a.float() - b.float()).norm() <= 1e-3 * b.float().norm() + 1e-7, name  # stored in half precision


def test_a_killed_process_ends_the_run_which_continues(base: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = words_of(clip, base, out, max_train_steps=300, checkpointing_steps=10)
    running, run = launched(*words), RunFolder(out)
    end = time.monotonic() + 300
    while len(run.steps()) < 25:
        assert time.monotonic() < end and running.poll() is None, running.communicate()[1]
        time.sleep(0.1)
    ranks = [each for each in psutil.Process(running.pid).children(recursive=True) if each.environ().get("RANK") == "1"]
    ranks[0].send_signal(signal.SIGKILL)
    _, errors = running.communicate(timeout=200)
    assert running.returncode != 0 and run.checkpoints() and not run.is_in_use, errors
    stopped = len(run.steps())
    assert not run.is_tuned and stopped < 300
    resumed = launched("tune", "--resume", str(out), "--max-train-steps", str(stopped + 5))
    _, errors = resumed.communicate(timeout=400)
    assert resumed.returncode == 0, errors
    assert run.is_tuned and [step["number"] for step in run.steps()] == [*range(1, stopped + 6)]


def test_the_prompts_of_an_edit_are_spread_over_processes(base: Path, clip: Path, tmp_path: Path) -> None:
    run = RunFolder(api.tune(clip, "a square", base=str(base), out=tmp_path / "run", mixed_precision="no", **BRIEF))
    prompts = ["a circle", "a red circle", "a blue square"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    done = launched("edit", str(run.path), *words, "--json")
    output, errors = done.communicate(timeout=400)
    assert done.returncode == 0, errors
    (told,) = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert sorted(told["edits"]) == [str(edit) for edit in run.whole_edits()] and len(told["edits"]) == 3
    assert [run.read_edit(edit)["prompt"] for edit in run.whole_edits()] == prompts
    together = {edit.name[4:]: (edit / "edit.mp4").read_bytes() for edit in run.whole_edits()}
    for edit in api.edit(run.path, prompts):
        assert (edit / "edit.mp4").read_bytes() == together[edit.name[4:]]
