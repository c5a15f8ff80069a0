"""Messages before, during and after a job, on wide, narrow and piped terminals."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import Said
from tuneavideo.cli import main
from tuneavideo.cli.console import Show
from tuneavideo.jobs import plan
from tuneavideo.progress import Events, Progress, Step, TimeLeft

QUICK = ["--max-train-steps", "4", "--num-inference-steps", "3", "--num-inv-steps", "3", "--no-gradient-checkpointing"]


@pytest.fixture
def tune(base: Path, clip: Path, tmp_path: Path) -> list[str]:
    return ["tune", str(clip), "--prompt", "a red square", "--base", str(base), "--out", str(tmp_path / "run"), *QUICK]


def job(prompt: str, steps: int = 200) -> Events:
    yield Progress("plan", about="loading", ahead={"tune": steps, "edit": 50})
    for number in range(1, steps + 1):
        yield Progress("tune", number, steps, Step(number, 0.0123, 1e-3, 20.0, 3 * 2**30))
    for number in range(1, 51):
        yield Progress("edit", number, 50, about=prompt)


def shown(columns: int, made: Events, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> list[str]:
    """The last lines of a terminal of so many columns, without colours."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")
    Show(False).run(made)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_stage_bar_count_and_time_left_have_room_before_the_prompt(columns: int, monkeypatch, capsys) -> None:
    prompt = "a panda is eating on the grass,\nblack and white, with a very long prompt " * 3
    tuned, edited = shown(columns, job(prompt), monkeypatch, capsys)[-2:]
    assert re.match(r"tune +━{12,} +200/200 +loss 0\.0123", tuned)
    assert re.match(r"edit +━{12,} +50/50 +0:00 left +a panda is", edited)
    assert max(len(tuned), len(edited)) <= columns and edited.endswith("…")


def test_slow_steps_are_told_in_seconds_and_a_pipe_hears_every_tenth_with_the_time_left(capsys) -> None:
    Show(False).run(job("a\ncat", steps=20))
    lines = capsys.readouterr().err.splitlines()
    assert "20.0 s/step" in lines[3] and " left " in lines[3]
    assert [line.split()[1] for line in lines if line.startswith("tune")] == [f"{n}/20" for n in range(2, 21, 2)]
    assert lines[-1].startswith("edit 50/50") and lines[-1].endswith("a cat")


def test_time_left_is_that_of_all_stages() -> None:
    left = TimeLeft()

    def after(progress: Progress, now: float) -> float | None:
        left.note(progress, now)
        return left.seconds()

    assert after(Progress("plan", ahead={"tune": 4, "invert": 2, "edit": 3}), 0) is None
    assert after(Progress("tune", 1, 4), 100) is None  # loading and the first step
    assert after(Progress("tune", 2, 4), 103) == 2 * 3 + 2 * 1 + 3 * 3
    assert after(Progress("tune", 3, 4), 106) == 1 * 3 + 2 * 1 + 3 * 3
    assert after(Progress("tune", 4, 4), 109) == 2 * 1 + 3 * 3
    assert after(Progress("edit", 1, 3), 200) == 2 * 3  # the inversion was kept
    assert after(Progress("edit", 2, 3), 210) == 10


def test_what_will_be_done_is_said_before_and_what_the_base_is_again_after(
    clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["tune", str(clip), "--prompt", "a red square moves on the grass", "--edit", "a helicopter over Paris"]
    main.main([*words, "--out", str(tmp_path / "run"), *QUICK])
    said = capsys.readouterr()
    first, *rest = said.err.splitlines()
    assert re.match("loading miniature: a toy .* --base sd1.5 ", first)
    plan_line = next(line for line in rest if line.startswith("square.mp4: "))
    assert plan_line == (
        "square.mp4: 6 of 6 frames (every frame, no more are there), 0 to 0.75 s of 0.75 s, at 64 x 64; "
        "4 steps, then 1 edit of 3 steps"
    )
    assert "does not know square, moves, helicopter, over, paris;" in said.err
    assert re.search("toy .* --base sd1.5", said.out)
    main.main(["edit", str(tmp_path / "run"), "--prompt", "a dog"])
    assert "1 edit of 3 steps: 6 frames at 64 x 64" in capsys.readouterr().err
    main.main(["invert", str(tmp_path / "run"), "--json"])
    assert json.loads(capsys.readouterr().out)["run"] == str(tmp_path / "run")


def test_a_run_keeps_which_frames_were_taken(tune: list[str], tmp_path: Path) -> None:
    main.main(tune)
    kept = yaml.safe_load((tmp_path / "run/settings.yaml").read_text())
    assert (kept["stride"], kept["num_frames"]) == (1, 6)


@pytest.mark.parametrize(
    ("words", "frames"), [(["--num-frames", "all"], 6), (["--num-frames=2"], 2), (["--stride=4"], 2)]
)
def test_frames_are_taken_as_they_are_asked_for(words, frames, tune: list[str], tmp_path: Path) -> None:
    main.main([*tune, *words])
    assert yaml.safe_load((tmp_path / "run/settings.yaml").read_text())["num_frames"] == frames


def test_more_frames_than_there_are_is_a_mistake_only_if_somebody_asked(tune: list[str], refused: Said) -> None:
    assert "has 6 frames; 7 frames, every 1 from 0, need 7; take 6 frames" in refused([*tune, "--num-frames", "7"])


def test_the_published_arithmetic_takes_one_frame_after_the_other() -> None:
    from tuneavideo.api import tune_settings

    assert tune_settings({"video": "a.mp4", "prompt": "a man", "preset": "official"}).stride == 1


def test_a_size_far_above_the_one_a_base_was_trained_at_is_warned_of() -> None:
    (line,) = plan.size_warnings("miniature", (512, 512), 64)
    assert "trained at 64 x 64" in line and "64 times as long" in line
    assert not [*plan.size_warnings("sd1.5", (640, 448), 512)]
    (line,) = plan.size_warnings("miniature", (416, 32), 64, is_set=False)
    assert "leave the size out" not in line and line.endswith("--width 64 --height 64 takes the middle of the clip")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--num-frames=1"], "one frame shows no motion"),
        (["--stride=100"], "one frame shows no motion"),
        (["--sample-fps=1000"], "frames repeat; lower --sample-fps"),
        (["--sample-fps=8"], ""),
    ],
)
def test_frames_that_teach_no_motion_are_warned_of(words: list[str], told: str, clip: Path) -> None:
    from tuneavideo.api import tune_settings

    number = {word.split("=")[0].strip("-").replace("-", "_"): int(word.split("=")[1]) for word in words}
    settings = tune_settings({"video": str(clip), "prompt": "a square", **number})
    span = plan.choose_frames(settings)
    lines = [*plan.frame_warnings(span, len(range(0, span.total, span.stride)[: span.count]) if span.stride else 6)]
    assert told in " ".join(lines) and bool(lines) == bool(told)
