"""Bases of every family and file format tune and edit; no code in a file is executed."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import memory
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.conftest import moving_square
from tests.families import UNETS, family_folder, original
from tests.shared.bases import Malicious
from tests.shared.job import BRIEF
from tuneavideo import TuneAVideoPipeline, TuneAVideoXLPipeline, api
from tuneavideo.bases import BASES
from tuneavideo.cli import main
from tuneavideo.errors import ModelError
from tuneavideo.method.conditioning import Conditions
from tuneavideo.method.inflate import video_unet
from tuneavideo.method.inversion import invert
from tuneavideo.method.noise import NoiseSchedule
from tuneavideo.method.sampling import generate
from tuneavideo.models import codec, loading, pipelines
from tuneavideo.video import read

PUBLISHED = {  # parameters of UNet, autoencoder and text encoders
    "sd1": (859_520_964, 83_653_863, 123_060_480),
    "sd2": (865_910_724, 83_653_863, 340_387_840),
    "sdxl": (2_567_463_684, 83_653_863, 123_060_480 + 694_659_840),
}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family."""
    return {kind: family_folder(kind, tmp_path_factory.mktemp(kind)) for kind in UNETS}


@pytest.mark.parametrize("kind", UNETS)
def test_every_family_tunes_and_edits(kind: str, bases: dict[str, Path], clip: Path, tmp_path: Path) -> None:
    run = api.tune(clip, "a square", base=str(bases[kind]), edit="a circle", out=tmp_path / "run", **BRIEF)
    (again,) = api.edit(run, "a circle")
    edits = [read(run / "edits" / name / "edit.mp4").frames_THWC for name in ("000-a-circle", again.name)]
    assert edits[0].shape == (3, 16, 16, 3) and (edits[0] == edits[1]).all()


def round_trip(base: Path, clip: Path) -> float:
    """PSNR in dB of a clip that was inverted and generated again, against what its latents decode to."""
    pipe = pipelines.load_pipeline(str(base))
    noise_schedule, video, empty = NoiseSchedule.of(pipe.scheduler), video_unet(pipe.unet), codec.embed(pipe, [""])
    clean = codec.encode(pipe, read(clip, count=2, size=(16, 16)))["mean"]
    *_, up = invert(video, noise_schedule, clean, empty, noise_schedule.inversion_grid(25, "trailing"))
    *_, down = generate(video, noise_schedule.sampler("ddim", 25, spacing="trailing"), up.latents, empty, empty, 1.0)
    (back,), (there,) = (codec.decode(pipe, latents, 8) for latents in (down.latents, clean))
    return 10 * np.log10(255**2 / max(1e-3, np.mean((back.frames_THWC.astype(float) - there.frames_THWC) ** 2)))


def test_the_velocity_is_inverted_as_well_as_the_noise_without_any_signal_at_the_last_level_too(
    bases: dict[str, Path], clip: Path, tmp_path: Path
) -> None:
    zero = shutil.copytree(bases["sd2"], tmp_path / "zero")
    config = zero / "scheduler/scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rescale_betas_zero_snr": True}))
    assert NoiseSchedule.of(pipelines.load_image_pipeline(str(zero)).scheduler).alphas[-1] == 0
    noise, velocity, without = (round_trip(base, clip) for base in (bases["turbo"], bases["sd2"], zero))
    assert noise > 40 and velocity > noise - 0.5 and without > 40


def test_stable_diffusion_xl_is_told_what_its_own_pipeline_tells_it(bases: dict[str, Path]) -> None:
    pipe = pipelines.load_image_pipeline(str(bases["xl"]))
    seen: dict[str, torch.Tensor] = {}

    def note(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs["added_cond_kwargs"], text=kwargs["encoder_hidden_states"])

    hook = pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
    pipe("a square", height=24, width=16, num_inference_steps=1, guidance_scale=5.0, output_type="latent")
    hook.remove()
    told = codec.embed(pipe, ["", "a square"])
    ours = told.added(12, 8)
    assert ours and torch.equal(ours["time_ids"], seen["time_ids"])
    assert torch.allclose(told.text_BLD, seen["text"], atol=1e-6) and not told.text_BLD[0].any()
    assert torch.allclose(ours["text_embeds"], seen["text_embeds"], atol=1e-6)


def test_conditions_are_split_repeated_and_joined_as_clips_are() -> None:
    both = Conditions(torch.randn(2, 5, 4), torch.randn(2, 3), torch.randn(2, 1, 6))
    first, second = both.split(1)
    assert len(first) == 1 and all(torch.equal(x, y) for x, y in zip(
        first.joined(second).tensors().values(), both.tensors().values(), strict=True))  # fmt: skip
    assert torch.equal(both.repeated(2).text_BLD, both.text_BLD[[0, 0, 1, 1]])
    assert torch.equal(first.expand(3).text_BLD, both.text_BLD[[0, 0, 0]])


def test_pipelines_of_clips_make_clips_of_stable_diffusion_xl(bases: dict[str, Path], clip: Path) -> None:
    pipe = TuneAVideoXLPipeline.from_pretrained(bases["xl"])
    quick = {"num_inference_steps": 2, "output_type": "latent"}
    latents = pipe.invert(read(clip, count=2, size=(16, 16)), num_inference_steps=2)
    made = pipe(["a square", "a circle"], latents=latents, **quick).frames
    told = codec.embed(pipe, ["a square", "a circle"])
    again = pipe(prompt_embeds=told.text_BLD, pooled_prompt_embeds=told.pooled_BD, latents=latents, **quick).frames
    assert made.shape == (2, 4, 2, 8, 8) and torch.equal(made, again)
    with pytest.raises(ModelError, match="TuneAVideoXLPipeline"):
        TuneAVideoPipeline.from_pretrained(bases["xl"])


def in_fp16(folder: Path) -> None:
    StableDiffusionPipeline.from_pretrained(folder).save_pretrained(folder / "new", variant="fp16")
    for part in ("unet", "vae", "text_encoder"):
        shutil.rmtree(folder / part)
        shutil.move(folder / "new" / part, folder / part)
    shutil.rmtree(folder / "new")


def pickled(folder: Path) -> None:
    for kept in folder.rglob("*.safetensors"):
        name = "pytorch_model" if kept.stem == "model" else kept.stem
        torch.save(load_file(kept), kept.with_name(f"{name}.bin"))
        kept.unlink()


def same_weights(a: Any, b: Any) -> bool:
    parts = ("unet", "vae", "text_encoder")
    return all(
        torch.equal(x, getattr(b, part).state_dict()[name])
        for part in parts
        for name, x in getattr(a, part).state_dict().items()
    )


@pytest.mark.parametrize("change", [in_fp16, pickled])
def test_a_folder_opens_whatever_form_its_weights_are_in(
    change: Callable[[Path], None], bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(bases["sd1"], tmp_path / "base")
    change(folder)
    assert not list(folder.rglob("model.safetensors")) and same_weights(
        pipelines.load_image_pipeline(str(folder)), pipelines.load_image_pipeline(str(bases["sd1"]))
    )


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_single_file_opens_with_the_configs_of_the_folder_it_lies_in(
    suffix: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    pipe = pipelines.load_image_pipeline(str(bases["sd1"]))
    shutil.copytree(bases["sd1"], tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / f"model.{suffix}"
    save_file(original(pipe), file) if suffix == "safetensors" else torch.save({"state_dict": original(pipe)}, file)
    assert same_weights(pipelines.load_image_pipeline(str(file)), pipe)
    assert isinstance(TuneAVideoPipeline.from_pretrained(file), TuneAVideoPipeline)


@pytest.fixture
def alone(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A single file far from any folder, whose family is the tests' own; the hub's cache is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(loading, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(loading, "FAMILIES", {24: "sd1"})
    shutil.copytree(bases["sd1"], tmp_path / "configs/sd1", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    (tmp_path / "alone").mkdir()
    save_file(original(pipelines.load_image_pipeline(str(bases["sd1"]))), tmp_path / "alone/model.safetensors")
    return tmp_path / "alone/model.safetensors"


def test_a_single_file_elsewhere_takes_our_configs_and_the_tokenizer_of_the_hub_cache(
    alone: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="holds no tokenizer.* 'hf download openai/clip-vit-large-patch14 vocab"):
        pipelines.load_image_pipeline(str(alone))
    cache = tmp_path / "hub/models--CompVis--stable-diffusion-v1-4"
    shutil.copytree(bases["sd1"] / "tokenizer", cache / "snapshots/abc/tokenizer")
    pipe = DiffusionPipeline.from_pretrained(bases["sd1"])
    vocabulary = {"vocab.json": pipe.tokenizer.get_vocab(), "merges.txt": None}
    for name, contents in vocabulary.items():
        (cache / "snapshots/abc/tokenizer" / name).write_text(json.dumps(contents) if contents else "#version: 0.2\n")
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("abc")
    ours = pipelines.load_image_pipeline(str(alone))
    assert same_weights(ours, pipe) and ours.tokenizer.pad_token == "<|endoftext|>"
    assert ours.tokenizer("a square").input_ids == pipe.tokenizer("a square").input_ids


@pytest.mark.parametrize("family", PUBLISHED)
def test_our_configs_make_models_of_the_published_sizes(family: str) -> None:
    folder = loading.CONFIGS / family
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        texts = [kind(kind.config_class.from_pretrained(folder / name)) for name, kind in kinds.items()
                 if (folder / name).is_dir()]  # fmt: skip
    sizes = [sum(p.numel() for model in part for p in model.parameters()) for part in ([unet], [vae], texts)]
    assert tuple(sizes) == PUBLISHED[family]
    assert DiffusionPipeline.load_config(folder)["unet"] == ["diffusers", "UNet2DConditionModel"]


def test_a_file_is_asked_whether_it_predicts_the_velocity(bases: dict[str, Path]) -> None:
    assert not loading._predicts_velocity(pipelines.load_image_pipeline("miniature"))  # trained to predict the noise
    assert loading._predicts_velocity(pipelines.load_image_pipeline(str(bases["sd2"])))


@pytest.mark.parametrize("place", ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "model.ckpt"])
@pytest.mark.parametrize("form", ["zip", "bare"])
def test_a_malicious_pickle_runs_nothing_and_is_refused_in_one_line(
    place: str, form: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(bases["sd1"], tmp_path / "base")
    for kept in (folder / place).parent.glob("*.safetensors"):
        kept.unlink()
    contents = {"weight": torch.zeros(1), "extra": Malicious(tmp_path / "ran")}
    if form == "zip":
        torch.save(contents, folder / place)
    else:
        (folder / place).write_bytes(pickle.dumps(contents))
    base = folder / place if place.endswith("ckpt") else folder
    with pytest.raises(ModelError) as refused:
        pipelines.load_image_pipeline(str(base))
    assert not (tmp_path / "ran").exists() and "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)
    if form == "zip":
        assert "refused, and nothing of it was run: besides tensors it names" in str(refused.value)
    torch.load(io.BytesIO((folder / place).read_bytes()), weights_only=False) if form == "zip" else pickle.loads(
        (folder / place).read_bytes()
    )
    assert (tmp_path / "ran").exists()  # it would have


def test_a_lora_is_no_base(tmp_path: Path) -> None:
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelError, match="no whole text-to-image model .* LoRAs and ControlNets go with"):
        pipelines.load_image_pipeline(str(tmp_path / "lora.safetensors"))


def test_the_table_says_the_memory_that_was_counted(capsys: pytest.CaptureFixture) -> None:
    counted = json.loads(memory.RESULTS.read_text())["bases_gb"]
    assert counted == {name: base.memory_gb for name, base in BASES.items() if base.family}
    main.main(["models", "--json"])
    known = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert known["sdxl"]["resolution"] == 1024 and known["sdxl"]["num_frames"] == 8
    main.main(["models"])
    said = capsys.readouterr().out
    assert all(name in said for name in BASES) and "counted, not measured" in said


def test_model_is_another_word_for_base(bases: dict[str, Path], tmp_path: Path) -> None:
    moving_square(tmp_path / "square.mp4")
    flags = [w for name, v in BRIEF.items() if v is not False for w in (f"--{name.replace('_', '-')}", str(v))]
    main.main(["tune", str(tmp_path / "square.mp4"), "--prompt", "a square", "--model", str(bases["sd1"]),
              "--out", str(tmp_path / "run"), *flags])  # fmt: skip
    assert f"base: {bases['sd1']}" in (tmp_path / "run/settings.yaml").read_text()


def test_a_config_without_a_size_means_that_of_stable_diffusion(base: Path) -> None:
    pipe = pipelines.load_image_pipeline(str(base))
    pipe.unet.register_to_config(sample_size=None)
    assert codec.default_size(pipe) == 64 * codec.stride(pipe)
