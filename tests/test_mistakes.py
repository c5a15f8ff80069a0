"""Each mistake is one line that says where, what was expected, what was found and what to do; exit code 2."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from tests.conftest import Said, base_folder, image_unet
from tests.shared.job import BRIEF
from tuneavideo import api
from tuneavideo.cli import main
from tuneavideo.settings import TuneSettings


@pytest.fixture
def tune(base: Path, clip: Path) -> list[str]:
    return ["tune", str(clip), "--prompt", "a square", "--base", str(base), "--num-frames", "3"]


def test_an_empty_caption(refused: Said) -> None:
    assert refused(["tune", "a.mp4", "--prompt", " "]) == "settings: prompt is empty; say in words what the clip shows"


def test_a_misspelt_setting_in_yaml(refused: Said, tune: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("learning_rat: 1")
    line = f"{tmp_path}/run.yaml: unknown setting 'learning_rat'; did you mean 'learning_rate'?"
    assert refused([*tune, "--config", f"{tmp_path}/run.yaml"]) == line


def test_a_missing_yaml_file(refused: Said, tune: list[str]) -> None:
    assert refused([*tune, "--config", "no.yaml"]) == "no.yaml: cannot be read: No such file or directory"


def test_a_missing_base_says_where_it_was_looked_for_and_what_to_download(refused: Said, clip: Path) -> None:
    line = refused(["tune", str(clip), "--prompt", "a square", "--base", "sd1.5"])
    assert line.startswith("base 'sd1.5' is not there: no such folder, and not in the hub's cache (")
    assert "/hub). Download it with 'hf download stable-diffusion-v1-5/stable-diffusion-v1-5', or give" in line
    assert line.endswith("; 'tuneavideo models' lists known bases")


@pytest.mark.parametrize(
    ("base", "advice"), [("sd15", "did you mean 'sd1.5'?"), ("xyz", "'tuneavideo models' lists the names")]
)
def test_a_misspelt_base(base: str, advice: str, refused: Said, clip: Path) -> None:
    line = refused(["tune", str(clip), "--prompt", "a square", "--base", base])
    assert line.startswith(f"base '{base}': ") and line.endswith(advice)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tune", "a.mp4", "--prompt", "x", "--num-frame", "3"],
         "unknown option '--num-frame'; did you mean '--num-frames'?"),
        (["tune", "a.mp4", "--prompt", "x", "--jsn"], "unknown option '--jsn'; did you mean '--json'?"),
        (["tune", "a.mp4", "--prompt", "x", "--zzz"], "'tuneavideo tune --help' lists the options"),
        (["models", "--jsn"], "unknown option '--jsn'; did you mean '--json'?"),
        (["tune", "a.mp4", "--prompt", "a", "man"],
         "unexpected 'man'; put words that belong together in quotes"),
        (["edit", "run", "--prompt", "a man", "a cat"], "unexpected 'a cat'; write an option before each value"),
        (["tune"], "CLIP and --prompt are missing; for example: tuneavideo tune skiing.mp4 --prompt "),
        (["tune", "a.mp4", "--prompt"],
         "argument --prompt: expected one argument; 'tuneavideo tune --help' lists the options"),
        (["tune", "a.mp4", "--prompt", "x", "--max-train-steps", "many"],
         "max_train_steps: input should be a valid integer; found 'many'"),
        (["tune", "a.mp4", "--prompt", "x", "--num-frames", "al"],
         "num_frames: input should be a valid integer or 'all'; found 'al'"),
        (["tune", "a.mp4", "--prompt", "x", "--fit", "crp"],
         "fit: input should be 'crop', 'pad' or 'stretch'; found 'crp'; did you mean 'crop'?"),
        (["doctor", "--json=3"],
         "argument --json: ignored explicit argument '3'; 'tuneavideo doctor --help' lists the options"),
    ],
)  # fmt: skip
def test_words_that_cannot_be_parsed(words: list[str], told: str, refused: Said) -> None:
    assert told in refused(words)


def test_a_base_that_is_no_model(refused: Said, tune: list[str], tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    line = refused([*tune, "--base", str(tmp_path / "base"), "--out", str(tmp_path / "run")])
    assert line.startswith(f"{tmp_path}/base: cannot be opened as a Stable Diffusion model: ")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_exists(refused: Said, tune: list[str], tmp_path: Path) -> None:
    line = f"{tmp_path} exists and is not empty; give another --out"
    assert refused([*tune, "--out", str(tmp_path)]) == line


@pytest.mark.parametrize("place", ["/proc/run", "/dev/null/run", "/dev/null"])
def test_a_folder_that_cannot_be_made(place: str, refused: Said, tune: list[str]) -> None:
    line = refused([*tune, "--out", place])
    assert line.startswith(f"{place} cannot be written: ") and line.endswith("; choose another place with --out")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            ["--width", "33", "--height", "16"],
            "width 33, height 16: this base takes multiples of 2; nearest is 32 x 16",
        ),
        (["--trainable-modules", "atn1"], "trainable_modules: no layer's name ends with 'atn1'; usual are attn1.to_q"),
        (["--optimizer", "adamm"], "optimizer 'adamm': "),
        (["--optimizer", "math.pi"], "optimizer 'math.pi': "),
        (["--optimizer", "adamw8bit"], "The 8-bit optimizer needs an optional part: pip install 'bitsandbytes>=0.45'"),
        (["--preset", "fast", "--window", "2"], "feature_reuse 2 does not go with windows (3 frames, windows of 2): "),
    ],
)
def test_what_the_model_does_not_take_leaves_no_folder(
    more: list[str], told: str, refused: Said, tune: list[str], tmp_path: Path
) -> None:
    assert refused([*tune, *more, "--out", str(tmp_path / "run")]).startswith(told)
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_or_shape(refused: Said, clip: Path, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    run = api.tune(clip, "a square", base=str(base), out=tmp_path / "run", **BRIEF | {"max_train_steps": 1})
    for unet, told in {
        image_unet(5): "the adapter was tuned on another base than this one (its query projections differ by ",
        image_unet(block_out_channels=(32, 32)): "the adapter does not fit this UNet: ",
    }.items():
        shutil.rmtree(base / "unet")
        unet.save_pretrained(base / "unet")
        line = refused(["edit", str(run), "--prompt", "a circle"])
        assert line.startswith(told) and repr(str(base)) in line and line.endswith("open that base")
    assert not (run / "edits").exists()


def test_a_prompt_longer_than_the_text_encoder_takes_is_a_warning_that_names_the_words_cut(
    base: Path, clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tests' encoder takes ten letters; the second run finds its caption in the cache and says it again."""
    for out in ("first", "second"):
        caplog.clear()
        api.tune(clip, "a red square moves", edit=["jumps"], base=str(base), out=tmp_path / out,
                 **BRIEF | {"max_train_steps": 1, "num_inference_steps": 1, "num_inv_steps": 1})  # fmt: skip
        said = [record.message for record in caplog.records if record.name.startswith("tuneavideo.jobs")]
        line = f"the prompt 'a red square moves' is longer than the 10 tokens that the text encoder of {base} takes"
        assert said == [f"{line}; left out: 'moves'"]
        assert caplog.records[0].levelno == logging.WARNING


def test_what_should_not_happen_is_one_line_too_and_debug_shows_where(
    refused: Said, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(api, "models", lambda: {}["none"])
    line = "unexpected KeyError: 'none'; --debug shows where; please report it with what 'tuneavideo doctor' prints"
    assert refused(["models"], code=1) == line
    with pytest.raises(SystemExit) as stopped:
        main.main(["models", "--debug"])
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and said.startswith("Traceback") and said.endswith(f"tuneavideo: {line}\n")


def test_debug_shows_where_a_mistake_was_noticed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(["edit", "nowhere", "--prompt", "x", "--debug"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("Traceback") and "tuneavideo: nowhere is no run folder" in said


def test_damaged_latents_of_a_run_are_made_again(
    base: Path, clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = api.tune(clip, "a square", base=str(base), out=tmp_path / "run", **BRIEF | {"max_train_steps": 1})
    latents = run / "latents.safetensors"
    latents.write_bytes(latents.read_bytes()[:-1] + b"\x77")
    assert len(api.edit(run, "a circle", num_inference_steps=1, num_inv_steps=1)) == 1
    assert f"{latents} is missing or damaged; made again from source.mp4" in caplog.text
    caplog.clear()
    api.edit(run, "a circle", num_inference_steps=1, num_inv_steps=1)
    assert "made again" not in caplog.text


def test_a_damaged_checkpoint_is_left_out_and_the_run_ends_the_same(
    base: Path, clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stated = BRIEF | {"checkpointing_steps": 1, "video": str(clip), "prompt": "a square", "base": str(base)}
    settings: TuneSettings = api.tune_settings(stated)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for _ in api.Job.tune(settings, out=whole):
        pass
    job = api.Job.tune(settings, out=broken)
    for each in job:
        if each.step and each.step.number == 3:
            job.close()
            break
    newest = broken / "checkpoints/000003.pt"
    data = newest.read_bytes()
    newest.write_bytes(data[:20_000] + bytes(4096) + data[24_096:])
    api.resume(broken)
    assert "000003.pt is damaged; continuing from the checkpoint before it" in caplog.text
    adapters = [(run / "adapter/adapter.safetensors").read_bytes() for run in (whole, broken)]
    assert adapters[0] == adapters[1]
