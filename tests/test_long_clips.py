"""What is true of clips too long for memory: they lie on the disk, and come out as they would from memory."""

from __future__ import annotations

import json
from functools import partial
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
from tuneavideo.errors import SettingsError
from tuneavideo.method import inversion, sampling, streaming
from tuneavideo.method.disk_latents import DiskLatents
from tuneavideo.method.inflate import VideoUNet, inflate
from tuneavideo.method.noise import NoiseSchedule
from tuneavideo.method.windows import WindowedUNet, Windows
from tuneavideo.models import host_memory
from tuneavideo.settings import SAMPLERS, STOCHASTIC_SAMPLERS
from tuneavideo.storage import cache
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
    out = api.tune(film, "a red square moves", edit=["a blue circle"], base=str(base), out=tmp_path / "run", **BRIEF)
    assert not whole  # no clip was gathered in memory
    monkeypatch.undo()
    assert same(run, out)
    assert np.abs(edit_of(out) - edit_of(run)).max() <= 1  # sums differ in their last bit
    for name in ("latents.safetensors", next((run / "inversion").iterdir()).relative_to(run)):
        here, there = cache.read(run / name), cache.read(out / name)
        assert here and there and all(torch.allclose(here[key], there[key], atol=1e-5) for key in here)
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
    assert set(run.rglob("*")) == before


def test_a_clip_on_the_disk_is_edited_without_feature_reuse_and_its_run_says_so(
    film: Path, base: Path, tmp_path: Path, on_disk: None
) -> None:
    seen, brief = [], BRIEF | {"num_frames": 8, "max_train_steps": 1, "feature_reuse": 2, "window": None}
    run = api.tune(
        film,
        "a red square moves",
        edit=["a circle"],
        base=str(base),
        out=tmp_path / "run",
        progress=seen.append,
        **brief,
    )
    assert ["feature_reuse 1 (was 2)" in each.about for each in seen if each.stage == "memory"] == [True]
    assert RunFolder.open(run).read_settings().feature_reuse == 1 and (run / "edits/000-a-circle/edit.json").is_file()


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


def test_only_memory_of_a_cpu_goes_back_after_every_window(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(host_memory, "release_memory", lambda: calls.append(0))
    for device in ("meta", "cpu"):
        streaming._alone(torch.empty(1, device=device))
    assert len(calls) == 1


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


# Piece by piece


@pytest.fixture(scope="module")
def video() -> VideoUNet:
    video = inflate(image_unet())
    video.unet.requires_grad_(False)
    return video


@pytest.fixture
def latents_on_disk(tmp_path: Path) -> DiskLatents:
    """Latents of fourteen frames, kept as the clip's are."""
    latents = torch.randn(1, 4, 14, 8, 8, generator=torch.Generator().manual_seed(2))
    cache.write(tmp_path / "kept.safetensors", {"latents": latents})
    kept = cache.read(tmp_path / "kept.safetensors", by_frames=True)
    assert kept
    return kept["latents"]


EVERY = (slice(None), slice(None), slice(None))


def test_latents_on_disk_reads_and_writes_frames_as_a_tensor_does(latents_on_disk: DiskLatents, tmp_path: Path) -> None:
    tensor = latents_on_disk[EVERY]
    assert torch.equal(latents_on_disk[:, :, [7, 0, 7]], tensor[:, :, [7, 0, 7]])
    with cache.writing(tmp_path / "new", {"b": latents_on_disk.shape, "a": (1, 4, 3, 8, 8)}) as made:
        made["b"].fill(latents_on_disk)
        made["b"][:, :, [3]] = tensor[:, :, [5]]
        made["a"][EVERY] = tensor[:, :, :3]
    tensor[:, :, 3] = tensor[:, :, 5]
    kept = cache.read(tmp_path / "new")
    assert kept and torch.equal(kept["b"], tensor) and torch.equal(kept["a"], tensor[:, :, :3])


@pytest.mark.parametrize("damage", [b"", b"\x01", b"cut"])
def test_a_damaged_file_of_latents_is_not_believed(damage: bytes, latents_on_disk: DiskLatents, tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-9] if damage == b"cut" else data[:-1] + damage)
    assert cache.read(path, by_frames=True) is None


def test_latents_on_disk_is_inverted_as_the_tensor_it_holds(
    video: VideoUNet, latents_on_disk: DiskLatents, tmp_path: Path
) -> None:
    unet, text, grid = WindowedUNet(video, Windows(6, 2)), torch.randn(1, 5, 24), LEVELS.inversion_grid(3, "trailing")
    clean = latents_on_disk[EVERY]
    way = [clean, *(step.latents for step in inversion.invert(unet, LEVELS, clean, text, grid))]  # pyright: ignore
    for whole, wished in ((True, way[::-1]), (False, way[-1:])):
        *_, last = streaming.invert(unet, LEVELS, latents_on_disk, text, grid, whole=whole, folder=tmp_path)
        for found, expected in zip(last.latents.split(1), wished, strict=True):
            assert torch.allclose(found[EVERY], expected, atol=1e-5)
    assert torch.equal(latents_on_disk[EVERY], clean)


def test_an_edit_on_the_disk_follows_its_clip_as_in_memory(
    video: VideoUNet, latents_on_disk: DiskLatents, tmp_path: Path
) -> None:
    unet, (text, negative, caption) = WindowedUNet(video, Windows(6, 2)), torch.randn(3, 1, 5, 24)
    *_, last = streaming.invert(
        unet, LEVELS, latents_on_disk, caption, LEVELS.inversion_grid(3, "trailing"), whole=True, folder=tmp_path
    )
    ways, outcomes = [last.latents.split(1), [each[EVERY] for each in last.latents.split(1)]], []
    for way, generate in zip(ways, (partial(streaming.generate, folder=tmp_path), sampling.generate), strict=True):
        sampler, source = LEVELS.sampler("ddim", 3, spacing="trailing"), sampling.Source(way, caption, 0.6)
        steps: Any = generate(unet, sampler, way[0], text, negative, 3.0, source=source, guidance_interval=(0.0, 0.6))  # pyright: ignore
        outcomes.append([*steps][-1].latents[EVERY])
    assert torch.allclose(*outcomes, atol=1e-4)
    sampler = LEVELS.sampler("ddim", 3, spacing="trailing")
    *_, alone = sampling.generate(unet, sampler, ways[1][0], text, negative, 3.0)  # pyright: ignore
    assert not torch.allclose(alone.latents, outcomes[1], atol=1e-2)


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - STOCHASTIC_SAMPLERS))
def test_latents_on_disk_is_denoised_by_every_sampler_as_the_tensor_it_holds(
    name: str, video: VideoUNet, latents_on_disk: DiskLatents, tmp_path: Path
) -> None:
    unet, (text, negative) = WindowedUNet(video, Windows(6, 2)), torch.randn(2, 1, 5, 24)
    outcomes = []
    for start, generate in ((latents_on_disk[EVERY], sampling.generate), (latents_on_disk, streaming.generate)):
        sampler, more = LEVELS.sampler(name, 4, spacing="trailing", strength=0.8), {}
        if generate is streaming.generate:
            more = {"folder": tmp_path}
        *_, last = generate(unet, sampler, start, text, negative, 3.0, generator=torch.Generator(), **more)  # pyright: ignore
        outcomes.append(last.latents[EVERY])
    assert torch.allclose(*outcomes, atol=1e-4)


def test_fresh_noise_is_mixed_into_latents_on_disk_at_its_share(latents_on_disk: DiskLatents, tmp_path: Path) -> None:
    clean, generator = streaming._copy(latents_on_disk, tmp_path), torch.Generator().manual_seed(1)
    assert streaming.mix_noise(latents_on_disk, clean, 0.3, 0.0, generator, folder=tmp_path) is latents_on_disk
    mixed = streaming.mix_noise(latents_on_disk, clean, 0.3, 1.0, generator, folder=tmp_path)
    noise = (mixed[EVERY] - 0.3**0.5 * clean[EVERY]) / 0.7**0.5
    assert float(noise.std()) == pytest.approx(1, abs=0.05)


def test_a_video_on_disk_holds_what_the_clip_in_memory_holds(film: Path, tmp_path: Path, on_disk: None) -> None:
    disk, video = read_any(film, tmp_path), read(film)
    assert isinstance(disk, DiskVideo) and not list(tmp_path.iterdir())
    assert (disk.frames, disk.height, disk.width, disk.fps) == (40, 32, 32, video.fps)
    for films in (zip(disk.images, disk.images, strict=True), zip(disk.images, video.images, strict=True)):
        assert all((a == b).all() for a, b in films)
    beside = [side_by_side(pair, labels=["a", "b"]) for pair in ((disk, video), (video, video))]
    assert all((a == b).all() for a, b in zip(*(each.images for each in beside), strict=True))
    write(disk, tmp_path / "frames")
    assert (read(tmp_path / "frames").frames_THWC == video.frames_THWC).all()
