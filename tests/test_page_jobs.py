"""What the page requests of its workers: previews without training, edits of a step or with a mask, measurements."""

from __future__ import annotations

import io
import json
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.clips import encode
from tests.shared.page import CLIP, FORM, client, tuned_run
from tuneavideo.job_settings import clip_edit_settings
from tuneavideo.progress import Progress
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import read
from tuneavideo.web.pages import estimate
from tuneavideo.web.queue import CANCELLED, WAITING, Queue
from tuneavideo.web.worker import Picture, begin

EDIT = {"prompt": "a cat"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tuned_run(tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def page(root: Path) -> Generator[TestClient, None, None]:
    with client(root) as page:
        yield page


def test_a_preview_without_training_is_the_edit_of_a_clip_that_the_command_line_makes(
    page: TestClient, root: Path
) -> None:
    answer = page.post(
        f"{CLIP}/tune", data=FORM | {"untrained": "1", "edit": "a cat\na fox", "num_inference_steps": "3"}
    )
    assert answer.headers["location"] == "/runs/dog-jumping-untrained-1"
    again = page.post(f"{CLIP}/tune", data=FORM | {"untrained": "1"})
    assert again.headers["location"] == "/runs/dog-jumping-untrained-2"
    request = Queue(root).waiting()[0]
    tuning, edits = clip_edit_settings(request.settings)
    assert request.kind == "preview" and edits.prompt == ("a cat", "a fox") and tuning.prompt == FORM["prompt"]
    assert (tuning.num_inference_steps, tuning.max_train_steps) == (3, 40), "its tuning is not shortened"


@pytest.mark.long
def test_an_interrupted_preview_is_made_anew_in_its_folder_and_then_tuned(root: Path) -> None:
    queue = Queue(root)
    values = {
        "run": str(read_clip()), "source_prompt": "a dog is jumping on the grass", "prompt": ["a cat"],
        "num_frames": 2, "num_inference_steps": 2, "max_train_steps": 2,
    }  # fmt: skip
    request = queue.add("preview", "fresh", values, is_new=True)
    left = begin(request, queue)
    for each in left:
        if each.stage == "open":
            break
    left.close()
    run = RunFolder(root / "fresh-1")
    assert [*run.path.iterdir()], "it was begun"
    pictures = Picture(queue.picture(request.id))
    shown = [number for each in begin(request, queue) if (number := pictures.made_of(each))]
    assert run.is_untuned and [run.read_edit(edit)["prompt"] for edit in run.whole_edits()] == ["a cat"]
    assert shown == [1] and Image.open(queue.picture(request.id)).size == (128, 64), "two frames, before the last step"
    assert [*begin(request, queue)] == [], "it is done"
    tune = queue.add("tune", run.path.name, {})
    assert [each.step.number for each in begin(tune, queue) if each.step] == [1, 2] and run.is_tuned


def read_clip() -> Path:
    from tuneavideo import miniature

    return Path(miniature.clips()[0]["path"])


def test_edits_are_requested_with_the_weights_of_a_step(page: TestClient, root: Path) -> None:
    assert '<option value="2">after step 2</option>' in page.get("/runs/dog-1").text
    assert page.post("/runs/dog-1/edit", data=EDIT | {"step": "2"}).status_code == 303
    assert page.post("/runs/dog-1/edit", data=EDIT | {"step": ""}).status_code == 303
    assert [request.settings.get("step") for request in Queue(root).waiting()] == ["2", None]
    for step, expected in (
        ("3", "no weights of step 3"),
        ("x", "step: input should be a valid integer"),
        ("-1", "step"),
    ):
        answer = page.post("/runs/dog-1/edit", data=EDIT | {"step": step})
        assert answer.status_code == 400 and expected in answer.text, answer.text


def picture(inside: np.ndarray, kind: str = "PNG") -> bytes:
    with io.BytesIO() as file:
        Image.fromarray(inside.astype(np.uint8) * 255).save(file, format=kind)
        return file.getvalue()


def test_a_mask_is_uploaded_at_the_size_of_the_clip_and_used(page: TestClient, root: Path, tmp_path: Path) -> None:
    inside = np.zeros((30, 50), bool)
    inside[:, 25:] = True
    answer = page.post("/runs/dog-1/masks?name=..%2Fmy+mask.png", content=picture(inside))
    assert (answer.status_code, answer.json()) == (201, {"mask": "my-mask-1"})
    made = np.asarray(Image.open(root / "dog-1/masks/my-mask-1/00000.png"))
    assert made.shape == (256, 256) and set(np.unique(made)) == {0, 255} and made[:, -1].all() and not made[:, 0].any()
    frames = [np.repeat(inside[:, :, None], 3, 2).astype(np.uint8) * 255 for _ in range(8)]
    clip = encode(tmp_path / "moving.mp4", frames, rate=8)
    assert page.post("/runs/dog-1/masks?name=moving.mp4", content=clip.read_bytes()).json() == {"mask": "moving-1"}
    assert len([*(root / "dog-1/masks/moving-1").iterdir()]) == 8
    assert page.get("/runs/dog-1/files/masks/my-mask-1/00000.png").headers["content-type"] == "image/png"
    assert page.post("/runs/dog-1/edit", data=EDIT | {"mask": "my-mask-1"}).status_code == 303
    (request,) = Queue(root).waiting()
    assert request.settings["mask"] == str(root / "dog-1/masks/my-mask-1")
    assert read(request.settings["mask"]).frames == 1
    for name in ("other", "../masks/my-mask-1", ".."):
        assert page.post("/runs/dog-1/edit", data=EDIT | {"mask": name}).status_code == 400


@pytest.mark.parametrize(
    ("name", "contents", "expected"),
    [
        ("dark.png", picture(np.zeros((8, 8), bool)), "all of it is dark"),
        ("bright.jpg", picture(np.ones((8, 8), bool), "JPEG"), "all of it is bright"),
        ("text.png", b"hello", "is no video; give"),
        ("mask.svg", b"<svg/>", "no ending of a picture or a video"),
        ("large.png", picture(np.zeros((1, 20_000), bool).repeat(1_000, 0)), "scale the clip down"),
    ],
    ids=["dark", "bright", "text", "other", "large"],
)
def test_a_mask_that_does_not_fit_is_refused_and_not_kept(
    name: str, contents: bytes, expected: str, page: TestClient, root: Path
) -> None:
    answer = page.post(f"/runs/dog-1/masks?name={name}", content=contents, headers={"accept": "application/json"})
    assert answer.status_code == 400 and expected in answer.json()["error"], answer.text
    assert str(root) not in answer.text
    assert not (root / "dog-1/masks").exists() and not [*(root / ".web/clips").iterdir()]


@pytest.mark.long
def test_time_and_memory_are_measured_where_no_run_has_measured_them(page: TestClient, root: Path) -> None:
    asked = f"{CLIP}/estimate?base=miniature&num_frames=8"
    assert "as earlier runs" in page.get(asked).json()["estimate"]
    page.post("/runs/dog-1/delete")
    found = page.get(asked).json()
    assert found == {"measure": True, "auto": True, "estimate": "Time and memory on this computer are not known yet."}
    sd = page.get(f"{CLIP}/estimate?base=sd1.5").json()
    assert (sd["measure"], sd["auto"]) == (False, False) and "at least 9.9 GB" in sd["estimate"], "it is not here"
    job = page.post(f"{CLIP}/measure", data=FORM).json()["job"]
    assert page.post(f"{CLIP}/measure", data=FORM).json()["job"] == job, "one is enough"
    queue = Queue(root)
    events = [*begin(queue.get(job), queue)]
    assert isinstance(events[-1], Progress) and events[-1].scores
    [measured] = json.loads((root / ".web/measured.json").read_bytes()).values()
    assert measured["pixels"] == 8 * 64 * 64 and measured["seconds"] > 0 and measured["more"] > 100
    assert {path.name for path in root.iterdir()} == {".web"} and not [*(root / ".web").glob("measured-*")]
    short, long = (page.get(f"{CLIP}/estimate?num_frames={frames}").json()["estimate"] for frames in (8, 16))
    assert "measured here in a few steps" in short and short != long
    assert queue.get(job).state == WAITING
    page.post(f"{CLIP}/tune", data=FORM)
    assert queue.get(job).state == CANCELLED, "measurements give way to other jobs"


def test_a_damaged_record_of_measurements_is_made_again(root: Path) -> None:
    queue = Queue(root)
    (queue.folder / "measured.json").write_text("{")
    assert estimate.measurements(root) == {}
    estimate.note(root, "miniature", {"pixels": 1.0, "seconds": 1.0, "memory": 1.0, "more": 1.0})
    assert estimate.measurements(root).keys() == {"miniature"}


def test_control_characters_and_html_of_a_caption_are_text(page: TestClient, root: Path) -> None:
    words = "a \x1b[2J\x00\u202edog <img src=x onerror=alert(1)>"
    assert page.post(f"{CLIP}/tune", data=FORM | {"prompt": words, "edit": words}).status_code == 303
    for path in ("/queue", "/", "/runs/dog-jumping-1", f"{CLIP}?prompt=%3Cimg+src%3Dx%3E&edit=%3Cimg+src%3Dx%3E"):
        assert "<img src=x" not in page.get(path).text, path
    (request,) = Queue(root).waiting()
    assert "\0" not in request.settings["prompt"]
