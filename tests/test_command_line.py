"""The command line: settings reach the job, mistakes are noticed before torch is imported, help shows the way in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tools import cli_reference

from tests.conftest import Said
from tuneavideo import __version__, api
from tuneavideo.cli import main
from tuneavideo.cli.options import COMMON, GROUPS
from tuneavideo.errors import SettingsError
from tuneavideo.evaluation.metrics import NAMES
from tuneavideo.evaluation.metrics.table import METRICS
from tuneavideo.settings import ClipEditSettings, TuneSettings
from tuneavideo.storage.run_folder import RunFolder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The settings, and the other arguments, that a command starts its job with."""

    def started(words: list[str]) -> Any:
        found: list[Any] = []
        for job in ("tune", "edit"):
            monkeypatch.setattr(api.Job, job, lambda settings, **more: found.append((settings, more)) or iter(()))
        main.main([*words, "--json"])
        return found[0]

    return started


def run_folder(path: Path, clip: Path, **settings: Any) -> str:
    """A run that has only its settings yet."""
    stated = {"video": str(clip), "prompt": "a square", **settings}
    RunFolder(path).write_settings(api.tune_settings(stated), {})
    return str(path)


# Settings


def test_an_edit_takes_the_settings_of_the_run_in_the_argument_not_of_another_one_named(
    asked: Any, clip: Path, tmp_path: Path
) -> None:
    mine = run_folder(tmp_path / "mine", clip, guidance_scale=3)
    other = run_folder(tmp_path / "other", clip, guidance_scale=9)
    for words in (["--control", other, "--controlnet", other, mine], [mine, "--edit-model", other]):
        settings, _ = asked(["edit", "--prompt", "a circle", *words])
        assert settings.run == mine and settings.guidance_scale == 3


def test_a_preset_of_an_edit_keeps_what_was_set_for_the_run(asked: Any, clip: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", clip, preset="official", guidance_scale=3, strength=0.5)
    settings, _ = asked(["edit", run, "--prompt", "a circle"])
    assert (settings.sampler, settings.timestep_spacing, settings.attention_injection) == ("ddim", "leading", 0)
    settings, _ = asked(["edit", run, "--prompt", "a circle", "--preset", "Fast", "--feature-reuse", "3"])
    assert (settings.sampler, settings.num_inference_steps, settings.feature_reuse) == ("dpm++", 20, 3)
    assert (settings.timestep_spacing, settings.attention_injection) == ("trailing", 0.6)  # no longer `official`
    assert (settings.guidance_scale, settings.strength) == (3, 0.5)
    assert api.edit_settings({"run": run, "prompt": ("a circle",), "preset": "fast"}).num_inference_steps == 20


def test_new_prompts_go_by_edit_in_both_commands(asked: Any, clip: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", clip)
    assert asked(["edit", run, "--edit", "a circle", "--prompt", "a dot"])[0].prompt == ("a circle", "a dot")
    assert asked(["tune", str(clip), "--prompt", "a square", "--edit", "a circle"])[0].edit == ("a circle",)


def test_a_yaml_file_of_tune_serves_an_edit(
    asked: Any, clip: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = run_folder(tmp_path / "run", clip)
    file = tmp_path / "tune.yaml"
    file.write_text("video: square.mp4\nprompt: a square\nedit: [a circle, a dot]\nguidance_scale: 7\nseed: 3\n")
    settings, _ = asked(["edit", run, "--config", str(file)])
    assert settings.prompt == ("a circle", "a dot") and settings.guidance_scale == 7
    assert "video, prompt, seed" in caplog.text
    assert asked(["edit", run, "--config", str(file), "--prompt", "a line"])[0].prompt == ("a line",)
    file.write_text("prompt: a line\nguidance_scale: 8\n")
    assert asked(["edit", run, "--config", str(file)])[0].prompt == ("a line",)


def test_a_yaml_file_names_the_run_folder_and_a_clip_beside_it(
    asked: Any, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tune.yaml").write_text("video: square.mp4\nprompt: a square\nout: there\n")
    monkeypatch.chdir(tmp_path.parent)
    settings, more = asked(["tune", "--config", str(tmp_path / "tune.yaml")])
    assert settings.video == str(clip) and str(more["out"]) == "there"
    assert str(asked(["tune", "--config", str(tmp_path / "tune.yaml"), "--out", "here"])[1]["out"]) == "here"
    (tmp_path / "tune.yaml").write_text("video: elsewhere.mp4\nprompt: a square\n")
    assert asked(["tune", "--config", str(tmp_path / "tune.yaml")])[0].video == "elsewhere.mp4"


def test_words_may_be_spelt_as_people_spell_them(
    asked: Any, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip.rename(tmp_path / "-dash.mp4")
    monkeypatch.chdir(tmp_path)
    spelt = (
        "--seeds 1,2,3 --fresh-noise 0.3 --start-time 19:50 --base SD1.5 --fit Crop --sampler DDIM --formats GIF MP4"
    )
    settings, _ = asked(["tune", "-dash.mp4", "--prompt", "a square", *spelt.split()])
    assert settings.video == str(tmp_path / "-dash.mp4")
    assert (settings.seeds, settings.start_time) == ((1, 2, 3), 1190.0)
    assert (settings.base, settings.fit, settings.sampler, settings.formats) == (
        "sd1.5",
        "crop",
        "ddim",
        ("gif", "mp4"),
    )
    assert settings.resolution == 512


def test_options_take_underscores_equal_signs_none_and_negations(asked: Any, clip: Path) -> None:
    words = "--max_train_steps=7 --memory 8 --no-clip-norm --gradient_checkpointing --guidance-interval 0.1 0.5"
    settings, _ = asked(["tune", *words.split(), "--window", "None", str(clip), "--prompt", "a=b --c"])
    assert (settings.max_train_steps, settings.memory, settings.window, settings.prompt) == (7, 8, None, "a=b --c")
    assert (settings.clip_norm, settings.gradient_checkpointing) == (False, True)
    assert settings.guidance_interval == (0.1, 0.5)


def test_a_resumed_run_may_name_its_clip_as_the_shell_sees_it(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder(tmp_path / "run", clip)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    settings = api.resumed_settings(run, {"video": "../square.mp4", "max_train_steps": 3})
    assert (settings.video, settings.max_train_steps) == (str(clip), 3)
    with pytest.raises(SettingsError, match="video cannot change"):
        api.resumed_settings(run, {"video": "../round.mp4"})


# Mistakes


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("tune a.mp4 --prompt x --steps 3", "--max-train-steps"),
        ("tune a.mp4 --prompt x --frames 3", "--num-frames"),
        ("tune a.mp4 --prompt x --device cuda", "CUDA_VISIBLE_DEVICES"),
        ("tune --video a.mp4 --prompt x", "the clip is given without an option"),
        ("edit r --prompt x --base sd1.5", "--edit-model"),
        ("edit r --prompt x --out there", "RUN/edits"),
        ("edit r --prompt x --steps 3", "--num-inference-steps"),
        ("edit r --prompt x --num-frames 3", "'tuneavideo tune'"),
        ("tune a.mp4 --promt x", "did you mean '--prompt'?"),
        ("edit r --promt x", "did you mean '--prompt'?"),
        ("tune --prompt x", "CLIP is missing"),
        ("edit r", "--prompt is missing"),
        ("edit", "RUN and --prompt are missing"),
        ("tune -dash.mp4 --prompt x", "'./-dash.mp4'"),
    ],
)
def test_what_other_programs_call_an_option_leads_to_its_name_here(words: str, advice: str, refused: Said) -> None:
    assert advice in refused(words.split())


@pytest.mark.parametrize(
    "command", ["adopt CLIP --prompt x --base miniature --checkpoint CLIP", "convert CLIP out --to diffusers"]
)
def test_a_video_is_no_file_of_weights(command: str, refused: Said, clip: Path, tmp_path: Path) -> None:
    words = command.replace("CLIP", str(clip)).replace("out", str(tmp_path / "out")).split()
    assert "not a file of weights" in refused(words)


TORCH_FREE = """
import sys
from tuneavideo.cli import main as cli
for line in sys.argv[1:]:
    try:
        cli.main(line.split())
    except SystemExit as stopped:
        assert stopped.code in (0, None, 2), (line, stopped.code)
    assert "torch" not in sys.modules, line
"""


def test_names_and_paths_are_checked_before_torch_is_imported(clip: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", clip)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    tune, edit = f"tune {clip} --prompt a", f"edit {run} --prompt a"
    lines = {
        "tune no.mp4 --prompt a": "no.mp4 does not exist",
        f"{tune} --base sd15": "did you mean 'sd1.5'?",
        f"{tune} --base ./no.safetensors": "does not exist",
        f"{tune} --out {tmp_path}/full": "is not empty",
        f"{tune} --out /dev/null/run": "cannot be written",
        "edit no --prompt a": "no run folder",
        f"{edit} --lora no.safetensors:0.8": "LoRA no.safetensors: no such file",
        f"{edit} --embedding no.pt": "embedding no.pt: no such file",
        f"{edit} --controlnet no": "ControlNet no: no such file",
        f"{edit} --edit-model no": "base 'no'",
        f"{edit} --ip-adapter no --ip-image no.png": "no such file",
        f"evaluate {run} --metrics clip_txt": "did you mean 'clip_text'?",
        "evaluate no": "no run folder",
        "convert no out --to ldm": "no does not exist",
        f"adopt {clip} --prompt a --checkpoint no": "no does not exist",
        "convert --help": "",
        "help tune": "",
        "edit --help": "",
        "mindone --help": "",
    }
    done = subprocess.run([sys.executable, "-c", TORCH_FREE, *lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for said, expected in zip(done.stderr.splitlines(), filter(None, lines.values()), strict=True):
        assert expected in said


def test_names_of_metrics_are_those_of_the_table() -> None:
    assert tuple(METRICS) == NAMES


# Help


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (
            "tune --help",
            ["OPTIONS] CLIP", "example:", "tuneavideo tune skiing.mp4", "instead of `--start`", "add --base"],
        ),
        ("help tune", ["OPTIONS] CLIP"]),
        ("edit --help", ["OPTIONS] RUN", "(default: the run's)", "--prompt TEXT", "Repeatable. (required)"]),
        ("edit --help-all", ["OPTIONS] RUN", "--edit TEXT"]),
        ("help", ["tune", "doctor"]),
        ("mindone --help", ["train", "infer"]),
        ("benchmark --help", ["tgve", "LOVEU", "miniature"]),
    ],
)
def test_help_names_what_is_needed(words: str, shown: list[str], capsys: pytest.CaptureFixture) -> None:
    try:
        main.main(words.split())
    except SystemExit as stopped:
        assert not stopped.code
    said = capsys.readouterr().out
    for each in shown:
        assert each in said


def shown(words: str, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stopped:
        main.main(words.split())
    assert not stopped.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMON)
def test_short_help_is_one_screen_and_long_help_is_complete(
    command: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    short, long = (shown(f"{command} {option}", capsys) for option in ("--help", "--help-all"))
    assert len(short.splitlines()) <= 45 and "--help-all" in short.splitlines()[-1]
    settings = {"tune": TuneSettings, "edit": ClipEditSettings}[command]
    for flag in {f"--{name.replace('_', '-')}" for name in settings.model_fields} - {"--video", "--run"}:
        assert re.search(rf"{flag}\b", long)


def test_every_option_is_in_one_group() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    settings = {*TuneSettings.model_fields, *ClipEditSettings.model_fields}
    assert len(grouped) == len({*grouped})
    assert {*grouped} == settings | {"out", "resume", "checkpoint", "config", "json", "debug"}
    assert {*grouped} >= {name for names in COMMON.values() for name in names}


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse lays out help differently")
def test_the_reference_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    cli_reference.run(["--check"])


def test_help_of_an_edit_shows_the_values_of_its_run(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = run_folder(tmp_path / "run", clip, guidance_scale=3.25)
    with pytest.raises(SystemExit):
        main.main(["edit", run, "--help"])
    said = capsys.readouterr().out
    assert "3.25" in said and "the run's)" not in said


@pytest.mark.parametrize("words", ["--version", "-V", "tune --version"])
def test_the_version_is_told_everywhere(words: str, capsys: pytest.CaptureFixture) -> None:
    main.main(words.split())
    assert capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("words", ["--help", "tune --help", "convert --help", "models --json"])
def test_a_closed_pipe_is_silent(words: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tuneavideo", *words.split()]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_a_shell_completes_commands_and_options(capsys: pytest.CaptureFixture) -> None:
    main.main(["completion"])
    script = capsys.readouterr().out
    for words, expected in {"tuneavideo ev": "evaluate", "tuneavideo edit run --gui": "--guidance-scale",
                            "tuneavideo convert --li": "--like", "tuneavideo edit so": ""}.items():  # fmt: skip
        ask = f"COMP_WORDS=({words}); COMP_CWORD={len(words.split()) - 1}; _tuneavideo; echo ${{COMPREPLY[*]}}"
        done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
        assert expected in done.stdout.split() if expected else not done.stdout.strip()


def test_a_table_in_a_pipe_is_not_cut(capsys: pytest.CaptureFixture) -> None:
    main.main(["models"])
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in capsys.readouterr().out
