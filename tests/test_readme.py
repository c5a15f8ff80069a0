"""What the README says runs, runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.test_job import BRIEF
from tuneavideo.cli import main
from tuneavideo.settings import EditSettings, TuneSettings
from tuneavideo.video import read

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def brief(text: str, base: Path, clip: Path) -> str:
    """The same on a tiny base and clip, in a few steps."""
    text = text.replace("skiing.mp4", str(clip)).replace("sd1.5", str(base)).replace("runs/skiing-1", "runs/square-1")
    steps = "".join(f", {name}={value}" for name, value in BRIEF.items() if name != "num_frames")
    return text.replace("stride=2, num_frames=24", f"num_frames=3{steps}")


def test_the_commands_and_the_python_run(
    base: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = [f"--{name.replace('_', '-')} {value}" for name, value in BRIEF.items() if value is not False]
    tune, edit = blocks("sh")[1].replace("\\\n", "").strip().splitlines()
    tune = brief(tune, base, clip).replace("--stride 2 --num-frames 24", " ".join(steps))
    for command in (tune, brief(edit, base, clip)):
        program, *words = shlex.split(command)
        assert program == "tuneavideo"
        main.main(words)
    assert len(list(Path("runs/square-1/edits").iterdir())) == 3
    for code in blocks("python"):
        exec(compile(brief(code, base, clip), "README.md", "exec"), {})
    assert read("spider-man.mp4").frames == 3


def test_its_figures_are_those_of_the_committed_results() -> None:
    text = README.read_text(encoding="utf-8")
    results = json.loads((README.parent / "benchmarks/results/cpu.json").read_text())
    for row in ("demo", "skiing-miniature", "tune-help"):
        assert f"| {results[row]['seconds']:.3g} s | {results[row]['peak_mb']} MB |" in text
    counted = json.loads((README.parent / "benchmarks/results/memory.json").read_text())["frames"]
    for frames, row in counted.items():
        assert f"| {frames} | {row['checkpointing_gb']} GB | {row['plain_gb']} GB |" in text


def test_every_option_it_names_exists() -> None:
    named = set(re.findall(r"--([a-z][a-z-]+)", README.read_text(encoding="utf-8")))
    elsewhere = {"multi", "num", "goldens", "config", "resume", "help"}  # of accelerate, the scripts and the command
    elsewhere |= {
        "train",
        "output",
        "ckpt",
        "video",
        "checkpoint",
        "commands",
    }  # of MindONE's commands and the benchmarks'
    known = {name.replace("_", "-") for kind in (TuneSettings, EditSettings) for name in kind.model_fields}
    assert {name.removeprefix("no-") for name in named} - elsewhere <= known
