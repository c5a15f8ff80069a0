"""A report is one page that opens anywhere and shows what a run holds, whole or not."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import Browser, chromium
from tests.conftest import moving_square
from tests.shared.job import BRIEF
from tuneavideo import api
from tuneavideo.cli import main
from tuneavideo.errors import DiskError, RunError
from tuneavideo.progress import Step
from tuneavideo.reporting.comparison import pieces
from tuneavideo.reporting.contents import Run
from tuneavideo.reporting.curve import curve, smoothed
from tuneavideo.reporting.formatting import duration

PROMPT = "a red square moves"
EDITS = ["a blue circle moves", "a \"red\" square <script>window.struck = 1</script> & moves 'on' the snow"]
METRICS = {
    "frame_consistency": {"unit": "cosine", "better": "higher", "about": "Like & like.", "baseline": 0.5},
    "warp_error": {"unit": "", "better": "lower", "about": "", "baseline": None, "baseline_source": None},
}


@pytest.fixture(scope="module")
def tuned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run with two edits, made once."""
    folder = tmp_path_factory.mktemp("tuned")
    clip = moving_square(folder / "square.mp4")
    return api.tune(clip, PROMPT, edit=EDITS, out=folder / "run", base=str(base), stride=2, **BRIEF)


@pytest.fixture
def run(tuned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tuned, tmp_path / "square"))


def reported(*runs: Path) -> str:
    return api.report(runs, runs[0].parent / "page.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """Return the visible text of the body in one line."""
    body = re.sub(r"<script>.*?</script>|<style>.*?</style>", "", page[page.index("<body>") :], flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", "", body).split())


def write_scores(run: Path, *values: float, **more) -> None:
    edits = [
        {
            "folder": path.name, "prompt": "-", "seed": 0,
            "scores": {
                name: {"value": value, "model": "clip", "revision": "0123456789abcdef", "frames": 3, "width": 16}
                for name in METRICS
            },
        }
        for path, value in zip(sorted((run / "edits").iterdir()), values, strict=True)
    ]  # fmt: skip
    missing = [{"metric": "pickscore", "why": "its model is not here"}]
    scores = {"format": 1, "metrics": METRICS, "edits": edits, "missing": missing} | more
    (run / "scores.json").write_text(json.dumps(scores), encoding="utf-8")


def test_it_shows_clips_prompts_loss_settings_versions_time_and_memory(run: Path) -> None:
    assert api.report(run) == run / "report.html"
    page = (run / "report.html").read_text(encoding="utf-8")
    text = text_of(page)
    assert page.count("data:video/mp4;base64,") == page.count("<video ") == 3
    for fact in (
        PROMPT,
        "a blue circle moves",
        "3 frames of 16 × 16",
        f"{BRIEF['max_train_steps']} steps in",
        "memory in tuning",
    ):
        assert fact in text
    assert page.count('class="smooth') == 1, "the loss"
    assert text.index("max_train_steps") < text.index("All settings") < text.rindex("max_train_steps")
    assert re.search(r"torch</th><td>2\.", page)
    assert f"tuneavideo evaluate {run}" in text, "how to get scores"


def test_it_asks_for_nothing_outside_itself(run: Path) -> None:
    write_scores(run, 0.6, 0.7)
    page = reported(run)
    assert not re.search(
        r"https?://|//[a-z]|@import|url\(", re.sub(r"<video[^>]*>|<script>.*?</script>", "", page, flags=re.S)
    )
    assert not re.search(r"https?:|import\(|fetch|XMLHttp|WebSocket", page[page.rindex("<script>") :])
    assert all(source.startswith(("data:", "#")) for source in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "default-src 'none'" in page, "and could not if it wanted to"
    assert str(run.parent.parent) not in page.replace(str(run), ""), "nor does it tell of other places on this machine"


def test_what_people_wrote_stays_text(run: Path) -> None:
    write_scores(run, 0.6, 0.7, missing=[{"metric": "<b>x</b>", "why": "</script><img src=x onerror=alert(1)>"}])
    page = reported(run)
    assert "<script>window" not in page and "<img" not in page and "<b>x" not in page
    assert page.count("<script>") == 1
    assert "&lt;/script&gt;&lt;img src=x" in page
    label = re.findall(r'aria-label="(edit: [^"]*)"', page)[1]
    assert "&lt;script&gt;" in label and "&#34;red&#34;" in label and "&#39;on&#39;" in label


def bars(page: str) -> list[str]:
    return [
        " ".join(re.sub("<[^>]+>", " ", bar).split())
        for bar in re.findall(r'<div class="bar .*?</div>\s*</div>', page, re.S)
    ]


def test_scores_are_bars_against_the_baseline(run: Path) -> None:
    write_scores(run, 0.4, 1.0)
    page = reported(run)
    assert bars(page) == ["0.7 +0.2 better", "0.4 −0.1 worse", "1 +0.5 better", "0.7", "0.4", "1"]
    assert page.count("<b style") == 6 and page.count("--width: 40.0%") == 2, "of the largest value, from nought"
    assert page.count('<s style="--left: 50.0%"') == 3, "the baseline"
    assert "Measured with clip at 0123456789ab, 3 frames." in text_of(page)
    text = text_of(page)
    assert "Not measured: pickscore: its model is not here" in text
    assert text.index("a blue circle moves") < text.index("frame consistency") < text.index("Not measured"), "below"
    assert "tuneavideo evaluate" not in page


def test_edits_of_one_prompt_are_distinguished(run: Path) -> None:
    """In the scores as below the pictures."""
    for path in (run / "edits").iterdir():
        made = json.loads((path / "edit.json").read_text())
        seed = int(path.name[:3])
        (path / "edit.json").write_text(json.dumps(made | {"prompt": "a cat", "seed": seed}))
    write_scores(run, 0.4, 1.0, missing=[{"metric": "flicker", "why": "no reason", "edits": ["001-a-cat"]}])
    text = text_of(reported(run))
    assert "Edit 000" in text and "Edit 001" in text
    assert "a cat (000)" in text and "a cat (001, seed 1)" in text
    assert "flicker (edits 001): no reason" in text
    other = Path(shutil.copytree(run, run.parent / "other"))
    assert text_of(reported(run, other)).count("a cat (number 2, seed 1)") == 1 + 2, "above the clips and by metric"


def test_among_runs_what_is_none_is_left_out(run: Path, capsys: pytest.CaptureFixture, caplog) -> None:
    (run.parent / "benchmark").mkdir()
    (run.parent / "report.html").write_text("x")
    names = [str(run.parent / name) for name in ("benchmark", "report.html", "square")]
    main.main(["report", *names, "--json"])
    assert json.loads(capsys.readouterr().out)["report"] == f"{run}/report.html"
    assert caplog.text.count("is no run folder") == 2
    with pytest.raises(RunError, match="is no run folder"):
        api.report(names[:2])


def test_several_runs_stand_side_by_side_and_are_measured_by_the_first(run: Path) -> None:
    other = Path(shutil.copytree(run, run.parent / "other"))
    api.edit(other, ["a blue square jumps"], num_inference_steps=1, num_inv_steps=1)
    settings = (other / "settings.yaml").read_text().replace("learning_rate: 3.0e-05", "learning_rate: 0.001")
    (other / "settings.yaml").write_text(settings)
    write_scores(run, 0.4, 1.0)
    write_scores(other, 0.5, 0.9, 0.3)
    page = reported(run, other)
    text = text_of(page)
    assert text.count("not in this run") == 1 and page.count("<video ") == 6, "one source for both, two and three edits"
    assert bars(page)[:4] == ["square: 0.7", "other: 0.7 ±0 same", "square: 0.4", "other: 0.5 +0.1 better"]
    assert bars(page)[8:12] == ["square: 0.7", "other: 0.7 ±0 same", "square: 0.4", "other: 0.5 +0.1 worse"]
    assert bars(page)[6:8] == ["square: –", "other: 0.3"]
    assert "learning_rate" in text[: text.index("All settings")], "they differ in it"


@pytest.mark.parametrize("file", ["scores.json", "steps.jsonl", "source.mp4", "settings.yaml", "edit.json", "edit.mp4"])
@pytest.mark.parametrize("contents", [b"", b"\xff\x00{", b"[1, 2]"])
def test_a_damaged_file_is_named_and_the_rest_is_shown(file: str, contents: bytes, run: Path) -> None:
    write_scores(run, 0.4, 1.0)
    first = sorted((run / "edits").iterdir())[0]
    (first / file if file.startswith("edit.") else run / file).write_bytes(contents)
    page = reported(run)
    text = text_of(page)
    assert page.count("<video ") == (3 if file in ("scores.json", "steps.jsonl", "settings.yaml") else 2)
    if file != "steps.jsonl":
        assert file in text
    else:
        assert not re.search(r"\d steps in", text)


def test_a_run_that_is_not_finished_or_has_no_edits_says_so(run: Path) -> None:
    shutil.rmtree(run / "edits")
    assert f"There are no edits yet. Make one with: tuneavideo edit {run} " in text_of(reported(run))
    shutil.rmtree(run / "adapter")
    (run / "source.mp4").unlink()
    text = text_of(reported(run))
    steps = BRIEF["max_train_steps"]
    assert f"Tuning is not finished: step {steps} of {steps}. Go on with: tuneavideo tune --resume {run}" in text
    assert "source.mp4 is missing" in text


def test_what_is_no_run_or_cannot_be_written_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no run folder"):
        api.report(tmp_path / "nothing")
    with pytest.raises(DiskError, match="cannot be written"):
        api.report(run, tmp_path)


def test_the_command_says_where_the_page_is(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    main.main(["report", str(run)])
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    main.main(["report", "square", str(run), "--json"])
    assert json.loads(capsys.readouterr().out) == {"report": "report.html", "runs": ["square", str(run)]}
    assert Path("report.html").is_file()


def test_torch_is_not_needed(run: Path) -> None:
    code = f"import sys; from tuneavideo import api; api.report({str(run)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_words_new_to_the_prompt_are_marked() -> None:
    new = [text for text, is_new in pieces("a cat, dancing on the snow", "a dog dancing on the grass") if is_new]
    assert new == ["cat,", "snow"]
    assert "".join(text for text, _ in pieces("  a\n  cat ", "a dog")) == "  a\n  cat "


def test_the_curve_is_of_the_relative_loss_if_every_step_has_one() -> None:
    steps = [Step(number, 0.1 * number, 1e-3, 1.0, 1, 1 / number) for number in range(1, 5)]
    run = Run("run", Path("run"), steps=steps)
    drawn = curve([run])
    assert drawn and drawn.relative and drawn.lines[0] and drawn.lines[0].last < 0.5
    steps[0] = Step(1, 0.1, 1e-3, 1.0, 1)
    drawn = curve([run])
    assert drawn and not drawn.relative


def test_the_smoothed_loss_is_a_mean_of_neighbours() -> None:
    assert smoothed(np.full(100, 0.3)) == pytest.approx(0.3)
    assert smoothed(np.array([0.2])) == pytest.approx(0.2)
    noisy = np.random.default_rng(0).uniform(0, 1, 900)
    assert smoothed(noisy).std() < 0.15 * noisy.std()
    assert [duration(seconds) for seconds in (0.5, 77.94, 600, 8000)] == ["0.5 s", "77.9 s", "10 min", "2 h 13 min"]


# In a browser

WATCHED = """new Promise(done => {
  const at = () => clips.map(clip => clip.video.currentTime);
  const seen = new Set(), end = performance.now() + 40000;
  let worst = 0, looks = 0;
  const watch = () => {
    worst = Math.max(worst, Math.max(...at()) - Math.min(...at()));
    seen.add(frame);
    if ((seen.size < count || ++looks < 60) && performance.now() < end) requestAnimationFrame(watch);
    else done({ worst, tick, seen: [...seen].sort() });
  };
  watch();
})"""
AT = "clips.map(({video, tick}) => Math.floor(video.currentTime / tick))"
WIDER = """[...document.querySelectorAll("body *")].filter(each => !each.closest(".scroll, .hidden")
  && (each.getBoundingClientRect().right > innerWidth + 0.5 || each.getBoundingClientRect().left < -0.5))
  .map(each => each.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def until(browser: Browser, script: str) -> None:
    end = time.monotonic() + 30
    while not browser.ask(script):
        assert time.monotonic() < end, f"never: {script}"
        time.sleep(0.05)


needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")


@needs_chromium
def test_clips_play_synchronously_and_obey_the_keys(run: Path, browser: Browser) -> None:
    browser.size(1280, 900)
    browser.open(api.report(run))
    until(browser, "playing && clips.length === 3 && clips.every(({video}) => video.currentTime > 0 && !video.paused)")
    watched = browser.ask(WATCHED)
    assert watched["worst"] <= watched["tick"] and watched["seen"] == [0, 1, 2], watched
    browser.press(" ")
    until(browser, "!playing && !moving && clips.every(({video}) => video.paused && !video.seeking)")
    for key, frame in (("Home", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowRight", 0), ("ArrowLeft", 2)):
        browser.press(key)
        until(browser, "!moving")
        assert browser.ask(AT) == [frame] * 3 and browser.ask("$('number').textContent") == f"{frame + 1} / 3"
    browser.ask("$('at').value = 1; $('at').dispatchEvent(new Event('input')); play()")
    until(browser, "!moving && frame === 2")
    watched = browser.ask(WATCHED)
    assert watched["worst"] <= watched["tick"], "after a seek as well"
    browser.press("r")
    until(browser, "!playing && !moving")
    assert browser.ask(AT) == [2] * 3, "without loop it stops at the last frame"
    assert browser.ask("window.struck") is None, "a prompt is no script"
    assert browser.trouble() == []
    assert [url for url in browser.requests() if url != (run / "report.html").as_uri()] == []


@needs_chromium
@pytest.mark.parametrize(
    ("width", "mode", "count"), [(1280, "light", 1), (1280, "dark", 2), (390, "dark", 1), (390, "light", 2)]
)
def test_it_fits_wide_and_narrow_by_day_and_night(
    width: int, mode: str, count: int, run: Path, tmp_path: Path, browser: Browser
) -> None:
    other = Path(shutil.copytree(run, run.parent / "a-run-of-a-rather-long-name-without-any-spaces-in-it-at-all"))
    write_scores(run, 0.4, 1.0)
    browser.size(width, 900)
    browser.prefer(prefers_color_scheme=mode)
    browser.open(api.report([run, other][:count], run.parent / "page.html"))
    browser.ask("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask(WIDER) == []
    until(browser, "clips.every(({video}) => video.readyState >= 2)")
    pixels = np.asarray(Image.open(browser.picture(tmp_path / "page.png")).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200, "not blank"
    assert np.median(pixels) > 200 if mode == "light" else np.median(pixels) < 60
    assert browser.trouble() == []


@needs_chromium
def test_reduced_motion_disables_autoplay(run: Path, browser: Browser) -> None:
    browser.prefer(prefers_reduced_motion="reduce")
    browser.open(api.report(run))
    until(browser, "!moving && clips.every(({video}) => video.readyState >= 2 && video.currentTime > 0)")
    assert browser.ask("playing") is False and browser.ask(AT) == [0, 0, 0]
    browser.prefer(prefers_reduced_motion="no-preference")
