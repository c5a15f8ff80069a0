"""YAMLs and flags of other programs tune and edit here, and keys without effect are listed."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.conftest import adapter_on
from tuneavideo import api
from tuneavideo.cli import main
from tuneavideo.config import checked, layers
from tuneavideo.errors import CheckpointError, SettingsError
from tuneavideo.interop import foreign_configs, mindone_flags
from tuneavideo.settings import TuneSettings
from tuneavideo.storage.run_folder import RunFolder

CONFIGS = Path(__file__).parent / "configs"
OFFICIAL, MINDONE = ((CONFIGS / f"{name}.yaml").read_text() for name in ("official", "mindone"))


def written(folder: Path, text: str, **changes: object) -> Path:
    values = yaml.safe_load(text)
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (values[section] if section else values)[key or name] = value
    path = folder / "theirs.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def settings(config: foreign_configs.Config, **more: object) -> TuneSettings:
    return checked(TuneSettings, layers(more, config.settings))


def test_the_published_yaml_is_read_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "man-skiing.yaml"
    path.write_text(OFFICIAL)
    config = foreign_configs.read_config(path, TuneSettings)
    found = settings(config)
    assert (found.video, found.prompt, found.base) == ("data/man-skiing.mp4", "a man is skiing", "sd1.4")
    assert (found.num_frames, found.width, found.height, found.start, found.stride) == (24, 512, 512, 0, 2)
    assert (found.preset, found.mixed_precision, found.seed, found.optimizer) == ("official", "fp16", 33, "adamw")
    assert (found.learning_rate, found.adam_epsilon, found.validation_steps) == (3e-5, 1e-8, 100)
    assert found.edit == ("mickey mouse is skiing on the snow", "spider man is skiing on the beach, cartoon style")
    assert (found.fresh_noise, found.guidance_scale, config.out) == (0.0, 12.5, "./outputs/man-skiing")
    assert len(caplog.records) == 1
    message = caplog.messages[0]
    assert "\n" not in message
    for key in ("video_length", "resume_from_checkpoint", "enable_xformers", "sd1.4"):
        assert key in message


def test_every_key_of_the_published_yaml_has_a_setting_or_a_reason() -> None:
    """No key is dropped in silence: each has a setting of ours, or a reason."""
    for table in (foreign_configs.OFFICIAL, foreign_configs.MINDONE):
        for key, ours in table.items():
            reason = ours.startswith(foreign_configs.NOT) and len(ours) > len(foreign_configs.NOT) + 5
            assert reason or ours in {*TuneSettings.model_fields, "out", "scale_lr", "betas", "clip_grad"}, key


def test_the_benchmarks_variant_is_read(tmp_path: Path) -> None:
    values = yaml.safe_load(OFFICIAL)
    data = values["train_data"]
    data["num_frames"], data["frame_rate"] = data.pop("n_sample_frames"), data.pop("sample_frame_rate")
    prompts = {"style": "a, oil painting", "object": "b", "background": "c", "multiple": ["d"]}
    values["validation_data"] |= {"prompts": prompts, "use_inv_latent": False}
    values |= {"scale_lr": True, "gradient_accumulation_steps": 4, "use_8bit_adam": True}
    config = foreign_configs.from_official(values, "x.yaml")
    found = settings(foreign_configs.Config(config.settings))
    assert found.edit == ("a, oil painting", "b", "c", "d")
    assert (found.num_frames, found.stride, found.fresh_noise) == (24, 2, 1.0)
    assert (found.learning_rate, found.optimizer) == (pytest.approx(12e-5), "adamw8bit")


@pytest.mark.parametrize(
    ("text", "change", "words"),
    [
        (OFFICIAL, {"learning_rat": 1}, "did you mean 'learning_rate'"),
        (OFFICIAL, {"train_data__n_sample_frame": 1}, "did you mean 'train_data.n_sample_frames'"),
        (OFFICIAL, {"validation_data__prompts": 3}, "expected prompts"),
        (OFFICIAL, {"train_data__n_sample_frames": "many"}, "num_frames"),
        (MINDONE, {"sample_intervall": 1}, "did you mean 'sample_interval'"),
        (MINDONE, {"version": "3"}, "unknown version '3'"),
        (MINDONE, {"optim": ["x"]}, "optim"),
    ],
)
def test_a_mistake_in_their_yaml_is_one_line(text: str, change: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=words) as refusal:
        foreign_configs.read_config(written(tmp_path, text, **change), TuneSettings)
    assert "\n" not in str(refusal.value)


def test_mindones_yaml_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = foreign_configs.read_config(written(tmp_path, MINDONE), TuneSettings)
    found = settings(config)
    assert (found.base, found.resolution, found.stride, found.fit) == ("sd2.1", 16, 2, "stretch")
    assert (found.adam_beta2, found.adam_epsilon, found.lr_scheduler) == (0.98, 1e-6, "cosine")
    assert (found.optimizer, found.max_grad_norm) == (foreign_configs.OPTIMIZERS["adamw"], foreign_configs.NO_CLIPPING)
    message = caplog.messages[0]
    assert "here 0, 2, 4, ...; MindONE used 1, 3, 5" in message
    for key in ("mode", "model_config", "init_loss_scale", "decay_steps", "end_learning_rate"):
        assert key in message


def test_mindones_training_flags_print_the_command(tmp_path: Path) -> None:
    path = written(tmp_path, MINDONE)
    words = ["--train_config", str(path), "--output", "runs/x", "--num_frames", "5", "--version", "1.5", "--dry_run"]
    config = mindone_flags.train(words)
    assert config.out == "runs/x"
    assert config.notices[0].startswith("tuneavideo tune square.mp4 ")
    assert {"--num-frames 5", "--base sd1.5", "--out runs/x"} <= {
        f"{a} {b}" for a, b in zip(config.notices[0].split(), config.notices[0].split()[1:], strict=False)
    }


def test_mindones_inference_flags_print_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = """--config c.yaml --version 2.1 --video_path v.mp4 --num_frames 4 --sample_interval 1 --prompt iron_man
        --ckpt_path sd-500.ckpt --output_path out --sampling_steps 30 --inv_sampling_steps 40 --seed 42 --fps 8 --H 768
        --W 512 --n_samples 2 --ddim --fixed_code --dry_run"""
    words = shlex.split(text)
    main.main(["mindone", "infer", *words])
    message = capsys.readouterr().err
    assert message.startswith("tuneavideo adopt v.mp4 ")
    for part in ("--checkpoint sd-500.ckpt", "--base sd2.1-base", "--edit iron_man", "--sampler ddim", "--height 768",
                 "--guidance-scale 9.0", "--formats gif frames", "--num-inv-steps 40", "n_samples"):  # fmt: skip
        assert part in message, part


def test_the_printed_command_is_valid(tmp_path: Path, base: Path, clip: Path) -> None:
    """Every option of the printed command is a setting."""
    config = mindone_flags.train(
        ["--train_config", str(written(tmp_path, MINDONE)), "--video_path", str(clip), "--dry_run"]
    )
    words = config.notices[0].split(" --")
    assert {word.split()[0].replace("-", "_") for word in words[1:]} - {"out"} <= {*TuneSettings.model_fields} | {
        f"no_{name}" for name in TuneSettings.model_fields
    }


BRIEF = {"num_inference_steps": 2, "num_inv_steps": 2}


def test_their_yaml_tunes_here(base: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(
        tmp_path, OFFICIAL, pretrained_model_path=str(base), output_dir="outputs/square", max_train_steps=1,
        validation_steps=1000, mixed_precision="no", train_data__video_path=str(clip), train_data__n_sample_frames=2,
        train_data__width=16, train_data__height=16, train_data__sample_frame_rate=1,
        validation_data__prompts=["a blue square"], validation_data__num_inference_steps=2,
        validation_data__num_inv_steps=2,
    )  # fmt: skip
    main.main(["tune", "--config", str(path)])
    run = RunFolder.open("outputs/square")
    assert run.is_tuned
    assert run.read_settings().preset == "official"
    assert run.edited() == {("a blue square", 0)}


def test_mindones_commands_run(base: Path, clip: Path, tmp_path: Path, capsys) -> None:
    out, path = tmp_path / "run", written(tmp_path, MINDONE)
    theirs = ["--base", str(base), "--video_path", str(clip), "--sample_interval", "1", "--num_frames", "2"]
    main.main(
        ["mindone", "train", "--train_config", str(path), "--output_path", str(out), "--max_train_steps", "1", *theirs]
    )
    assert RunFolder.open(out).is_tuned
    api.convert(out, tmp_path / "sd-1.ckpt", to="mindone")
    steps = ["--sampling_steps", "2", "--inv_sampling_steps", "2", "--H", "16", "--W", "16"]
    words = [
        "--ckpt_path",
        str(tmp_path / "sd-1.ckpt"),
        "--prompt",
        "a blue square",
        "--output_path",
        str(tmp_path / "edited"),
    ]
    main.main(["mindone", "infer", *theirs, *words, *steps])
    edit = next((tmp_path / "edited" / "edits").iterdir())
    assert (edit / "edit.gif").is_file()
    assert len(list((edit / "frames").iterdir())) == 2
    assert "tuneavideo adopt" in capsys.readouterr().err


def test_what_another_program_tuned_is_edited_here(base: Path, clip: Path, tmp_path: Path) -> None:
    layers = load_file(adapter_on(base, tmp_path / "adapter") / "adapter.safetensors")
    torch.save(layers, tmp_path / "tuneavideo-500.pth")
    given = {
        "video": str(clip),
        "prompt": "a red square",
        "base": str(base),
        "num_frames": 2,
        "edit": ("a blue square",),
    }
    job = api.Job.adopt(api.tune_settings({**given, **BRIEF}), tmp_path / "tuneavideo-500.pth", out=tmp_path / "run")
    made = [each.path for each in job if each.path]
    run = RunFolder.open(tmp_path / "run")
    assert run.is_tuned
    assert made[-1] is not None
    assert (made[-1] / "edit.mp4").is_file()
    again = api.edit(tmp_path / "run", "a red circle", **BRIEF)
    assert json.loads((again[0] / "edit.json").read_text())["prompt"] == "a red circle"


def test_a_whole_model_brings_its_own_base(base: Path, clip: Path, tmp_path: Path, capsys) -> None:
    api.convert(adapter_on(base, tmp_path / "adapter"), tmp_path / "theirs", to="official")
    words = [str(clip), "--checkpoint", str(tmp_path / "theirs"), "--out", str(tmp_path / "run"), "--num-frames", "2"]
    main.main(["adopt", *words, "--prompt", "a red square", "--json"])
    assert json.loads(capsys.readouterr().out)["run"] == str(tmp_path / "run")
    assert (tmp_path / "run" / "base" / "model_index.json").is_file()
    assert RunFolder.open(tmp_path / "run").is_tuned


def test_what_was_not_tuned_is_not_adopted(base: Path, clip: Path, tmp_path: Path) -> None:
    given = api.tune_settings({"video": str(clip), "prompt": "x", "base": str(base)})
    with pytest.raises(CheckpointError, match="no temporal layers"):
        list(api.Job.adopt(given, base, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_convert_command_reports(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter_on(base, tmp_path / "adapter")
    main.main(["convert", str(tmp_path / "adapter"), str(tmp_path / "x.ckpt"), "--to", "mindone"])
    out = capsys.readouterr().out
    assert "adapter: " in out
    assert "0 missing, 0 left over" in out
    main.main(
        [
            "convert",
            str(tmp_path / "x.ckpt"),
            str(tmp_path / "x.lora.safetensors"),
            "--to",
            "lora",
            "--base",
            str(base),
            "--json",
        ]
    )
    assert json.loads(capsys.readouterr().out)["error"] < 1


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "tuneavideo.interop.foreign_configs")
