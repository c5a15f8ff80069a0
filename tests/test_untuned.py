"""What is true of edits without tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Said
from tuneavideo import api
from tuneavideo.cli import main
from tuneavideo.errors import RunError, SettingsError
from tuneavideo.evaluation import miniature
from tuneavideo.models import pipelines
from tuneavideo.reporting.contents import read_run
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import read

SETTINGS: dict[str, Any] = {
    "mixed_precision": "no",
    "num_frames": 3,
    "num_inference_steps": 2,
    "max_train_steps": 2,
    "formats": ("frames",),
}


@pytest.fixture
def untuned(base: Path, clip: Path, tmp_path: Path) -> Path:
    """A run folder with an edit without tuning."""
    out = tmp_path / "untuned"
    api.edit(clip, "a circle", source_prompt="a square", base=str(base), out=out, progress=False, **SETTINGS)
    return out


def frames(edit: Path) -> np.ndarray:
    return read(edit / "frames").frames_THWC


def test_an_edit_without_tuning_is_that_of_the_control(untuned: Path, base: Path, clip: Path) -> None:
    run = RunFolder.open(untuned)
    assert run.is_untuned and not run.is_tuned and not run.adapter.exists() and not run.is_new
    settings = run.read_settings()
    assert (settings.prompt, settings.edit, settings.num_frames, settings.stride) == ("a square", ("a circle",), 3, 2)
    [made] = run.whole_edits()
    assert run.read_edit(made)["tuned_steps"] == 0
    pipe = pipelines.load_image_pipeline(str(base), device="cpu")
    _, [control], _ = miniature._edit(pipe, settings, ["a circle"], tuned=False)
    assert np.array_equal(frames(made), control.frames_THWC)


def test_it_is_tuned_afterwards_as_from_the_start(untuned: Path, base: Path, clip: Path, tmp_path: Path) -> None:
    options = {"edit": "a circle", "base": str(base), "out": tmp_path / "tuned", "progress": False, **SETTINGS}
    tuned, run = RunFolder(api.tune(clip, "a square", **options)), RunFolder(untuned)
    [before] = run.whole_edits()
    first = frames(before)
    api.resume(untuned, progress=False)
    weights = "adapter/adapter.safetensors"
    assert (untuned / weights).read_bytes() == (tuned.path / weights).read_bytes()
    kept, made = run.whole_edits()
    assert np.array_equal(frames(kept), first)
    assert np.array_equal(frames(made), frames(tuned.whole_edits()[0]))
    assert [run.read_edit(each)["tuned_steps"] for each in (kept, made)] == [0, 2]
    assert not run.is_untuned and len([*(untuned / "inversion").iterdir()]) == 1


def test_it_is_a_run_for_the_other_commands(untuned: Path) -> None:
    [edit] = api.edit(untuned, "a red circle", guidance_scale=3.0, progress=False)
    assert json.loads((edit / "edit.json").read_text())["tuned_steps"] == 0
    assert api.invert(untuned, progress=False).is_file()
    assert api.evaluate(untuned, metrics=["warp_error"], progress=False) == [untuned / "scores.json"]
    assert api.report(untuned).is_file()
    seen = read_run(RunFolder(untuned), "run")
    assert [edit.about.split(", ")[0] for edit in seen.edits] == ["without tuning"] * 2
    assert ("tuned", "no") in seen.facts and any("not tuned" in note.text for note in seen.notes)


def test_a_tuning_that_was_stopped_is_not_taken_for_it(untuned: Path) -> None:
    job = api.Job.tune(api.resumed_settings(untuned, {"learning_rate": 1e-3, "lora_rank": 2}), resume=untuned)
    for each in job:
        if each.step:
            job.close()
            break
    with pytest.raises(RunError, match="not tuned to its end"):
        api.edit(untuned, "a red circle", progress=False)


def test_the_command_line_prints_how_to_tune(
    base: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "edit.yaml").write_text("num_inference_steps: 2\nprompt: a circle\n")
    words = ["--source-prompt", "a square", "--base", str(base), "--num-frames", "2", "--config"]
    main.main(["edit", str(clip), *words, str(tmp_path / "edit.yaml"), "--out", str(tmp_path / "run")])
    assert f"tuneavideo tune --resume {tmp_path / 'run'}" in capsys.readouterr().err


def test_mistakes_are_found_before_a_folder_is_made(untuned: Path, clip: Path, refused: Said, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "new")]
    edit = ["edit", str(clip), "--prompt", "a circle"]
    assert "--source-prompt" in refused(edit + out)
    assert "does not exist" in refused(["edit", "no.mp4", "--source-prompt", "a", "--prompt", "b", *out])
    assert "--prompt is missing" in refused(["edit", str(clip), "--source-prompt", "a square", *out])
    assert "stride" in refused([*edit, "--source-prompt", "a square", "--stride", "0", *out])
    assert "is not empty" in refused([*edit, "--source-prompt", "a square", "--out", str(untuned)])
    assert "cannot change" in refused(["edit", str(untuned), "--prompt", "a circle", "--num-frames", "2"])
    assert not (tmp_path / "new").exists()
    with pytest.raises(SettingsError, match="prompt"):
        api.edit(clip, [], source_prompt="a square", out=tmp_path / "new")
