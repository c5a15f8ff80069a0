"""Clips on disk, too long for memory, give the results of clips in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from tests.conftest import Said, image_unet
from tests.shared.job import same
from tests.shared.noise import STABLE
from tuneavideo import api
from tuneavideo.cli import main
from tuneavideo.errors import DiskError, SettingsError
from tuneavideo.method import editing
from tuneavideo.method.inflate import inflate
from tuneavideo.method.noise import NoiseSchedule
from tuneavideo.method.windows import WindowedUNet, Windows
from tuneavideo.models.controlnet import maps
from tuneavideo.storage import cache, tensors
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import DiskVideo, Video, clip, read, read_any, write
from tuneavideo.video.montage import side_by_side

LEVELS = NoiseSchedule.of(DDIMScheduler(**STABLE))
BRIEF = {"num_frames": 40, "window": 8, "max_train_steps": 3, "learning_rate": 1e-2, "num_inference_steps": 2,
         "num_inv_steps": 2, "gradient_checkpointing": False, "guidance_scale": 3.0, "mixed_precision": "no",
         "formats": ("mp4", "frames")}  # fmt: skip


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty frames, in which a square moves to and fro."""
    path = tmp_path_factory.mktemp("film") / "square.mp4"
    frames = np.full((40, 32, 32, 3), 200, np.uint8)
    for t in range(40):
        left = round(10 + 8 * np.sin(t / 6))
        frames[t, 10:18, left : left + 8] = (200, 30, 30)
    write(Video(frames, 8.0), path)
    return path


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip, "IN_MEMORY", 4096)


@pytest.fixture(scope="module")
def run(film: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a clip of five windows, in memory."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return api.tune(film, "a red square moves", edit=["a blue circle"], base=str(base), out=out, **BRIEF)


def edit_of(run: Path) -> np.ndarray:
    (edit,) = sorted((run / "edits").glob("*-a-blue-circle"))
    return read(edit / "frames").frames_THWC.astype(int)


def test_a_clip_of_many_windows_is_tuned_and_edited(run: Path) -> None:
    assert edit_of(run).shape == (40, 16, 16, 3)
    for name in ("edit.mp4", "side-by-side.mp4"):
        assert read(run / "edits/000-a-blue-circle" / name).frames == 40


def test_a_clip_on_the_disk_is_tuned_and_edited_as_in_memory(
    run: Path, film: Path, base: Path, tmp_path: Path, on_disk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: list[Any] = []
    monkeypatch.setattr(np, "stack", lambda *args, **_: whole.append(args))
    monkeypatch.setenv("TUNEAVIDEO_CACHE", str(tmp_path / "cache"))
    out = api.tune(film, "a red square moves", edit=["a blue circle"], base=str(base), out=tmp_path / "run", **BRIEF)
    assert not whole  # no clip was gathered in memory
    monkeypatch.undo()
    assert same(run, out)
    assert (edit_of(out) == edit_of(run)).all()
    for name in ("latents.safetensors", next((run / "inversion").iterdir()).relative_to(run)):
        here, there = cache.read(run / name), cache.read(out / name)
        assert here and there and all(torch.equal(here[key], there[key]) for key in here)
    assert not list(out.rglob("*.part"))


def test_a_later_edit_of_a_clip_on_the_disk_starts_from_its_kept_inversion(run: Path, on_disk: None) -> None:
    kept, seen = set((run / "inversion").iterdir()), []
    (folder,) = api.edit(run, ["a blue square"], progress=seen.append, formats=("gif", "frames"))
    assert set((run / "inversion").iterdir()) == kept and not any(each.stage == "invert" for each in seen)
    assert read(folder / "frames").frames == read(folder / "edit.gif").frames == 40


def test_edits_of_a_clip_in_windows_are_refused_feature_reuse_and_controlnets_before_any_work(run: Path) -> None:
    before = set(run.rglob("*"))
    with pytest.raises(SettingsError, match=r"feature_reuse 2 does not go with windows .* set feature_reuse to 1"):
        api.edit(run, ["a blue square"], feature_reuse=2, num_inference_steps=3, num_inv_steps=3)
    with pytest.raises(SettingsError, match=r"controlnet does not go with windows"):
        api.edit(run, ["a blue square"], controlnet="some/where")
    assert set(run.rglob("*")) - {RunFolder(run).error} == before


def test_a_run_begun_with_feature_reuse_in_windows_is_resumed_as_its_error_says(
    film: Path, base: Path, tmp_path: Path, refused: Said
) -> None:
    """Such runs were begun before they were refused."""
    brief = BRIEF | {"num_frames": 8, "window": 4, "max_train_steps": 2, "checkpointing_steps": 1}
    stated = {"video": str(film), "prompt": "a red square moves", "edit": ("a circle",), "base": str(base), **brief}
    job, run = api.Job.tune(api.tune_settings(stated), out=tmp_path / "run"), RunFolder(tmp_path / "run")
    for each in job:
        if each.step:
            job.close()
    run.write_settings(run.read_settings().model_copy(update={"feature_reuse": 2}), {})
    line = refused(["tune", "--resume", str(run.path)])
    *_, command = line.partition("; go on with: tuneavideo ")
    assert command.split() == ["tune", "--resume", str(run.path), "--feature-reuse", "1"]
    main.main(command.split())
    assert len(run.whole_edits()) == 1


def test_a_broken_off_run_of_a_clip_on_the_disk_is_resumed(
    run: Path, film: Path, base: Path, tmp_path: Path, on_disk: None
) -> None:
    stated = {"video": str(film), "prompt": "a red square moves", "base": str(base), **BRIEF}
    job = api.Job.tune(api.tune_settings(stated), out=tmp_path / "run")
    for each in job:
        if each.step and each.step.number == 1:
            job.close()
            break
    assert same(api.resume(tmp_path / "run"), run)


def test_windows_are_among_what_a_run_keeps(run: Path) -> None:
    (folder,) = api.edit(run, ["a red circle"])
    assert json.loads((folder / "edit.json").read_text())["window"] == 8


def test_a_trajectory_on_disk_holds_what_it_holds_in_memory(tmp_path: Path) -> None:
    video, text = inflate(image_unet()), torch.randn(1, 5, 24)
    unet: Any = WindowedUNet(video, Windows(6, 2))
    clean = torch.randn(1, 4, 14, 8, 8, generator=torch.Generator().manual_seed(2))
    grid, out = LEVELS.inversion_grid(3, "trailing"), tensors.mapped((4, 4, 14, 8, 8), tmp_path)
    (*_, expected), (*_, found) = (editing.invert(unet, LEVELS, clean, text, grid, out=each) for each in (None, out))
    assert torch.equal(found.trajectory.latents, expected.trajectory.latents)
    assert found.trajectory.latents.data_ptr() == out.data_ptr() and not list(tmp_path.iterdir())
    cache.write(tmp_path / "kept.safetensors", {"latents": out})
    kept = cache.read(tmp_path / "kept.safetensors")
    assert kept and torch.equal(kept["latents"], out)


def test_a_trajectory_that_the_disk_does_not_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="make room"):
        tensors.mapped((2**50,), tmp_path)


@pytest.mark.parametrize("damage", [b"", b"\x01", b"cut"])
def test_a_damaged_file_of_latents_is_not_believed(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    cache.write(path, {"latents": torch.randn(1, 4, 14, 8, 8)})
    data = path.read_bytes()
    path.write_bytes(data[:-9] if damage == b"cut" else data[:-1] + damage)
    assert cache.read(path) is None


def test_a_video_on_disk_holds_what_the_clip_in_memory_holds(film: Path, tmp_path: Path, on_disk: None) -> None:
    disk, video = read_any(film, tmp_path), read(film)
    assert isinstance(disk, DiskVideo) and not list(tmp_path.iterdir())
    assert (disk.frames, disk.height, disk.width, disk.fps) == (40, 32, 32, video.fps)
    for films in (zip(disk.images, disk.images, strict=True), zip(disk.images, video.images, strict=True)):
        assert all((a == b).all() for a, b in films)
    assert torch.equal(maps("canny", disk), maps("canny", video))
    beside = [side_by_side(pair, labels=["a", "b"]) for pair in ((disk, video), (video, video))]
    assert all((a == b).all() for a, b in zip(*(each.images for each in beside), strict=True))
    write(disk, tmp_path / "frames")
    assert (read(tmp_path / "frames").frames_THWC == video.frames_THWC).all()
