"""Jobs on a simulated device that is not the CPU: no tensor is left there, few operations wait for it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from benchmarks import parity
from torch.utils import backend_registration

from tests.conftest import base_folder, clip_folder, moving_square
from tests.families import family_folder
from tests.shared.style import PROMPT, style_files
from tuneavideo import TuneAVideoPipeline, api, video
from tuneavideo.video import read

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="torch before 2.9"
    ),
]
BRIEF = {"num_frames": 3, "stride": 2, "max_train_steps": 3, "learning_rate": 1e-2, "num_inference_steps": 3,
         "num_inv_steps": 3, "guidance_scale": 3.0, "mixed_precision": "bf16"}  # fmt: skip
# How a run is tuned, and how it is edited afterwards.
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"mixed_precision": "no"}, {}),
    "longer": ({"mixed_precision": "no", "max_train_steps": 13}, {}),
    "together": ({}, {"batch_prompts": 2, "prompts": ["a red circle", "a square"]}),
    "previews": (
        {"gradient_checkpointing": True, "validation_steps": 3, "use_ema": True, "edit": ["a circle"]},
        {"batch_guidance": False},
    ),
    "losses": ({"snr_gamma": 5.0, "optimizer": "adafactor"}, {"strength": 0.5}),
    "batches": ({"gradient_accumulation_steps": 2, "train_batch_size": 2}, {"sampler": "unipc"}),
    "windows": ({"window": 2}, {"sampler": "euler-ancestral", "attention_injection": 0.0, "seeds": (1, 2)}),
    "on disk": ({"window": 2, "num_frames": 6, "stride": 1}, {"fresh_noise": 0.3}),
    "official": ({"preset": "official"}, {}),
    "fast": ({"preset": "fast"}, {"sampler": "deis", "fresh_noise": 0.3}),
    "offload": ({"offload": True}, {"sampler": "heun", "attention_injection": 0.0}),
    "velocity": ({"base": "sd2"}, {"guidance_interval": (0.0, 0.5)}),
    "xl": ({"base": "xl", "mixed_precision": "no"}, {}),
}
STYLES = ("kohya", "embedding", "controlnet", "picture")
IN_MEMORY = video.clip.IN_MEMORY


def made_run(folder: Path, name: str) -> None:
    """A run, and edits of it."""
    tuned, edited = RUNS[name]
    base = folder / "bases" / tuned.get("base", "sd1")
    video.clip.IN_MEMORY = 4096 if name == "on disk" else IN_MEMORY
    run = api.tune(folder / "clip.mp4", "a square", out=folder / name, **(BRIEF | tuned | {"base": str(base)}))
    api.edit(run, **({"prompts": [PROMPT], "formats": ("frames",)} | edited))


def styled(folder: Path) -> None:
    for name, settings in style_files(folder / "styles").items():
        if name in STYLES:
            api.edit(folder / "together", [PROMPT], **settings)


def made_by_pipeline(folder: Path) -> None:
    pipe = TuneAVideoPipeline.from_pretrained(str(folder / "bases/sd1")).to(PartialState().device)
    noise = pipe.invert(read(folder / "clip.mp4", count=3, size=(16, 16)), num_inference_steps=2)
    assert pipe("a circle", latents=noise, num_inference_steps=2, output_type="np").frames.shape == (1, 3, 16, 16, 3)


def evaluated(folder: Path) -> None:
    api.evaluate(folder / "plain", clip=str(clip_folder(folder / "clip")), pick=str(folder / "clip"))


def compared(_: Path) -> None:
    """With what the published code computed, within the same bounds."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = parity.main(["--goldens", "tests/goldens", "--device", "elsewhere"])
    assert code == 0, said.getvalue()


JOBS: dict[str, Callable[[Path], None]] = {name: partial(made_run, name=name) for name in RUNS}
JOBS |= {"styled": styled, "pipeline": made_by_pipeline, "evaluated": evaluated, "compared": compared}


def all_elsewhere(folder: Path) -> None:
    """Every job in this process; prints a line of JSON for each: what went wrong, and what was counted."""
    from tests.elsewhere import counts, elsewhere

    for name, job in JOBS.items():
        counts.clear()
        wrong = ""
        try:
            with elsewhere():
                job(folder)
        except Exception:
            wrong = traceback.format_exc()
        counted = [[kind, place, number] for (kind, place), number in counts.items()]
        print(json.dumps({"name": name, "wrong": wrong, "counted": counted}), flush=True)


Told = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Told:
    """The folder of all runs, and what was printed of each job."""
    folder = tmp_path_factory.mktemp("elsewhere")
    moving_square(folder / "clip.mp4")
    base_folder(folder / "bases/sd1")
    for kind in ("sd2", "xl"):
        family_folder(kind, folder / "bases" / kind)
    (folder / "styles").mkdir()
    words = [sys.executable, "-W", "ignore", "-m", "tests.test_other_device", str(folder)]
    own = os.environ | {"TUNEAVIDEO_CACHE": str(folder / "cache")}  # what is computed there is rounded otherwise
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1], env=own, timeout=400)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(JOBS), done.stderr
    return folder, {row["name"]: row for row in rows}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_done_on_another_device(name: str, there: Told) -> None:
    _, said = there
    assert not said[name]["wrong"], said[name]["wrong"]


def test_what_is_made_there_is_what_the_cpu_makes(there: Told) -> None:
    folder, _ = there
    (folder / "plain").rename(folder / "there")
    made_run(folder, "plain")
    edits = [read(next((folder / run / "edits").glob("*/frames"))).frames_THWC for run in ("there", "plain")]
    assert abs(edits[0].astype(int) - edits[1]).max() <= 1


def test_a_step_of_tuning_waits_once_for_the_device(there: Told) -> None:
    """For the loss and the norm of the gradients, which are copied together; what is drawn is copied to the device."""
    few, many = (
        {(kind, place): number for kind, place, number in there[1][name]["counted"] if place.startswith("tuning.py")}
        for name in ("plain", "longer")
    )
    for kind, times in (("waits", 0), ("copies", 3 + 1)):
        more = {at: number - few.get(at, 0) for at, number in many.items() if at[0] == kind and "__init__" not in at[1]}
        assert sum(more.values()) == times * 10, more


if __name__ == "__main__":
    all_elsewhere(Path(sys.argv[1]))
