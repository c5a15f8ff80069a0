"""The page as a user meets it: a real server, real jobs on the miniature, and Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import axe_playwright_python
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

from tests.clips import encode
from tests.page_server import BRIEF, Server, served
from tuneavideo import miniature
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import probe, read

AWAY = Path(__file__)  # a file that is no mask
CHROMIUM = shutil.which("chromium") or ""
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
# Folder that gets the pictures of docs/page.md.
PICTURES = os.environ.get("TUNEAVIDEO_PICTURES")
PATIENCE = 180_000.0  # milliseconds for a job on a busy computer

expect.set_options(timeout=90_000)
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page") / "runs"


@pytest.fixture(scope="module")
def server(root: Path) -> Generator[Server, None, None]:
    with served(root) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Generator[Browser, None, None]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, **options: Any) -> tuple[Page, list[str]]:
    """Return a new page, and the errors that it will have."""
    errors = list[str]()

    def note(message: ConsoleMessage) -> None:
        if message.type == "error":
            errors.append(message.text)

    page = browser.new_context(reduced_motion="reduce", **options).new_page()
    page.on("console", note)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("dialog", lambda dialog: dialog.accept())
    page.set_default_timeout(120_000)
    return page, errors


def picture(page: Page, name: str) -> None:
    if PICTURES:
        page.screenshot(path=Path(PICTURES) / f"{name}.png")


def faults(page: Page) -> list[Any]:
    """Return what axe-core finds on a page, with the places."""
    page.evaluate(AXE + "; 0")
    found = "axe.run().then(found => found.violations.map(each => [each.impact, each.id, each.nodes[0].html]))"
    return page.evaluate(found)


def test_a_clip_is_uploaded_trimmed_tuned_edited_compared_and_downloaded(
    server: Server, browser: Browser, root: Path, tmp_path: Path
) -> None:
    page, errors = opened(browser, viewport={"width": 1440, "height": 900})
    clip = read(miniature.clips()[0]["path"])
    upload = encode(tmp_path / "my dog.mp4", [*clip.frames_THWC], rate=8)
    page.goto(server.url)
    page.locator("#file").set_input_files(upload)
    page.wait_for_url("**/clips/*")
    trim_and_train(page)
    page.wait_for_url("**/runs/my-dog-1")
    run = RunFolder(root / "my-dog-1")
    watch(page, run)
    play(page)
    download_and_repeat(page, run, tmp_path / "edit.mp4")
    page.get_by_role("button", name="Delete a cat").click()
    expect(page.get_by_text("Edit 001")).to_have_count(0)
    assert len(run.whole_edits()) == 3
    page.get_by_role("link", name="Report").click()
    expect(page.locator("#player")).to_be_visible()
    assert not errors, errors


def trim_and_train(page: Page) -> None:
    page.locator("#from").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#number")).to_have_text("4 / 16")
    page.locator("#num_frames").fill("4")
    expect(page.locator("#strip img")).to_have_attribute("alt", "4 frames")
    expect(page.locator("#strip-note")).to_contain_text("4 frames of 64 × 64 pixels, from 0.38 s")
    page.locator("#prompt").fill("a dog is jumping on the grass")
    page.locator("#edit").fill("a panda is jumping on the grass")
    page.locator("#max_train_steps").fill("30")
    page.locator("#validation_steps").fill("15")
    page.locator("#keep_weights").select_option("on")
    expect(page.locator("#estimate")).to_contain_text("a step, and", timeout=PATIENCE)
    page.locator("h1").evaluate("heading => heading.scrollIntoView()")
    picture(page, "page-clip")
    page.get_by_text("All settings").click()
    page.locator("#num_inference_steps").fill("5")
    page.get_by_role("button", name="Train", exact=True).click()


def watch(page: Page, run: RunFolder) -> None:
    expect(page.locator(".job .state")).to_have_text("running", timeout=PATIENCE)
    expect(page.locator(".job .detail")).to_contain_text("training step", timeout=PATIENCE)
    expect(page).to_have_title(re.compile("%"), timeout=PATIENCE)
    expect(page.locator("#loss-now")).to_contain_text("of 30", timeout=PATIENCE)
    expect(page.get_by_text("Edit 000")).to_be_visible(timeout=PATIENCE)
    assert page.locator("table .sample").count() == 3, "previews of the steps 0, 15 and 30"
    assert read(run.source).frames_THWC.shape == (4, 64, 64, 3)
    own = run.read_settings()
    assert (own.start_time, own.max_train_steps, own.num_inference_steps) == (0.375, 30, 5)

    page.locator("#edit-form #prompt").fill("a cat is jumping on the grass\na dog is jumping in the snow")
    page.get_by_role("button", name="Make edits").click()
    expect(page.get_by_text("Edit 002")).to_be_visible(timeout=PATIENCE)


def play(page: Page) -> None:
    until(
        page, "document.body.classList.contains('ready') && !document.querySelector('video:not([data-alone])').seeking"
    )
    page.locator("h1").click()
    for key, shown in (("l", "2 / 4"), ("ArrowRight", "3 / 4"), ("j", "2 / 4"), ("End", "4 / 4"), ("Home", "1 / 4")):
        page.keyboard.press(key)
        expect(page.locator("#number")).to_have_text(shown)
    page.keyboard.press("k")
    expect(page.locator("#play")).to_have_attribute("aria-label", "Pause")
    page.keyboard.press(" ")
    expect(page.locator("#play")).to_have_attribute("aria-label", "Play")
    times = "[...document.querySelectorAll('video:not([data-alone])')].map(video => video.currentTime.toFixed(2))"
    until(page, f"new Set({times}).size === 1")
    page.locator("#wipe").fill("25")
    assert page.locator(".wipe video").last.evaluate("video => video.style.clipPath") == "inset(0px 0px 0px 25%)"
    page.locator("#wipe-edit").select_option(index=1)
    page.locator("h1").evaluate("heading => heading.scrollIntoView()")
    picture(page, "page-run")


def download_and_repeat(page: Page, run: RunFolder, file: Path) -> None:
    with page.expect_download() as download:
        page.get_by_role("link", name="mp4 of a panda").click()
    download.value.save_as(file)
    assert "a panda is jumping" in probe(file).comment
    page.locator("#load-file").set_input_files(file)
    expect(page.locator("#edit-form #prompt")).to_have_value("a panda is jumping on the grass")
    expect(page.locator("#edit-form #num_inference_steps")).to_have_value("5")
    page.get_by_role("button", name="Repeat a panda").click()
    expect(page.get_by_text("Edit 003")).to_be_visible(timeout=PATIENCE)
    made = run.whole_edits()
    first, again = (read(edit / "edit.mp4").frames_THWC for edit in (made[0], made[3]))
    assert (first == again).all(), "the same settings make the same edit"


def test_edits_are_made_of_a_step_and_within_a_mask(
    server: Server, browser: Browser, root: Path, tmp_path: Path
) -> None:
    page, errors = opened(browser, viewport={"width": 1440, "height": 900})
    run, mask = RunFolder(root / "my-dog-1"), np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "right half.png")
    page.goto(f"{server.url}/runs/my-dog-1")
    page.get_by_role("button", name="Edit from this step").first.click()
    expect(page.locator("#step")).to_have_value("15")
    page.locator("#edit-form #prompt").fill("a cat is jumping on the grass")
    page.locator("#mask-file").set_input_files(tmp_path / "right half.png")
    expect(page.locator("#mask")).to_have_value("right-half-1")
    expect(page.locator("#mask-picture")).to_be_visible()
    page.locator("#mask-file").set_input_files(AWAY)
    expect(page.locator("#mask-error")).to_contain_text("no ending of a picture or a video")
    page.get_by_role("button", name="Make edits").click()
    expect(page.get_by_text("step 15, mask right-half-1")).to_be_visible(timeout=PATIENCE)
    edit = run.whole_edits()[-1]
    made, source = read(edit / "edit.mp4").frames_THWC, read(run.source).frames_THWC
    left, right = (
        np.abs(made[:, :, part].astype(int) - source[:, :, part]).mean() for part in (slice(30), slice(34, None))
    )
    assert left < 2 < right, "outside the mask the clip is kept"
    assert run.read_edit(edit)["tuned_steps"] == 15
    page.get_by_text("Push to the Hugging Face hub").click()
    assert page.locator("#token").get_attribute("type") == "password"
    assert [each for each in errors if "400" not in each] == [], errors


def test_a_clip_is_edited_without_training_and_shown_while_it_is_sampled(server: Server, browser: Browser) -> None:
    page, errors = opened(browser, viewport={"width": 1440, "height": 900})
    page.goto(f"{server.url}/clips/cat-running")
    page.locator("#edit").fill("a dog is running in the room")
    page.get_by_text("All settings").click()
    page.locator("#num_inference_steps").fill("60")
    page.get_by_role("button", name="Preview without training").click()
    page.wait_for_url("**/runs/cat-running-untrained-1")
    expect(page.locator(".job .picture")).to_be_visible(timeout=PATIENCE)
    picture(page, "page-sampling")
    expect(page.get_by_text("Edit 000")).to_be_visible(timeout=PATIENCE)
    expect(page.get_by_text("Edited without tuning")).to_be_visible()
    expect(page.get_by_role("button", name="Tune")).to_be_visible()
    assert not errors, errors


def test_the_page_works_at_a_phones_width_by_keyboard_alone(server: Server, browser: Browser) -> None:
    page, errors = opened(browser, viewport={"width": 390, "height": 844}, has_touch=True)
    page.goto(server.url)
    press_until(page, "document.activeElement.textContent === 'Bundled clips'")
    if not page.evaluate("document.activeElement.parentElement.open"):
        page.keyboard.press("Enter")
    press_until(page, "document.activeElement.getAttribute('href') === '/clips/cat-running'")
    page.keyboard.press("Enter")
    page.wait_for_url("**/clips/cat-running")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    press_until(page, "document.activeElement.id === 'max_train_steps'")
    page.keyboard.press("Home")
    press_until(page, "document.activeElement.textContent === 'All settings'")
    page.keyboard.press("Enter")
    press_until(page, "document.activeElement.id === 'num_inference_steps'")
    page.keyboard.press("Control+a")
    page.keyboard.type("3")
    page.locator("#part").evaluate("heading => heading.scrollIntoView()")
    picture(page, "page-phone")
    press_until(page, "document.activeElement.textContent === 'Train'")
    page.keyboard.press("Enter")
    page.wait_for_url("**/runs/cat-running-1")
    expect(page.get_by_text("New edits")).to_be_visible(timeout=PATIENCE)
    press_until(page, "document.activeElement.id === 'prompt'")
    page.keyboard.type("a dog is running in the room")
    press_until(page, "document.activeElement.textContent === 'Make edits'")
    page.keyboard.press("Enter")
    expect(page.get_by_text("Edit 000")).to_be_visible(timeout=PATIENCE)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    expect(page.locator("#live")).to_have_attribute("role", "status")
    assert not errors, errors


def test_many_tabs_show_a_job_that_one_of_them_requests(server: Server, browser: Browser) -> None:
    first, errors = opened(browser)
    tabs = [first, *(first.context.new_page() for _ in range(7))]  # more than a browser's connections to one host
    for tab in tabs:
        tab.goto(f"{server.url}/queue")
    status, text = server.send("/clips/dog-jumping/measure", BRIEF, accept="application/json")
    assert status == 202, text
    for tab in tabs:
        shown = tab.locator(f"[data-job='{json.loads(text)['job']}'] .state")
        expect(shown).to_have_text("done", timeout=PATIENCE)
    first.close()
    assert server.send("/clips/dog-jumping/measure", BRIEF)[0] == 202
    for tab in tabs[1:]:
        expect(tab.locator("main .jobs").first).to_contain_text("Measurement", timeout=PATIENCE)
    assert not errors, errors


def until(page: Page, script: str) -> None:
    """Wait until an expression is true; the page's policy forbids Playwright's own way."""
    end = time.monotonic() + 90
    while not page.evaluate(script):
        assert time.monotonic() < end, script
        page.wait_for_timeout(100)


def press_until(page: Page, condition: str) -> None:
    """Press Tab until the element with the focus meets a condition; the focus is always visible."""
    for _ in range(150):
        page.keyboard.press("Tab")
        if page.evaluate(condition):
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", condition
            return
    raise AssertionError(condition)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_no_page_has_faults_of_accessibility(server: Server, browser: Browser, scheme: Any, width: int) -> None:
    page, _ = opened(browser, viewport={"width": width, "height": 900}, color_scheme=scheme)
    for place in ("/", "/clips/dog-jumping", "/runs/my-dog-1", "/queue", "/runs/nothing"):
        page.goto(server.url + place)
        page.wait_for_timeout(500)
        if place == "/runs/my-dog-1" and scheme == "dark" and width == 1440:
            picture(page, "page-dark")
        assert faults(page) == [], place
        assert page.evaluate("document.documentElement.scrollWidth") == width, place
