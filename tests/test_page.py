"""The page: requests that it answers and requests that it refuses, without a worker."""

from __future__ import annotations

import io
import os
import re
import struct
import threading
import zlib
from collections.abc import Generator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from filelock import FileLock
from starlette.testclient import TestClient

from tests.clips import barcodes, encode
from tests.shared.page import CLIP, FORM, ORIGIN, client, tuned_run
from tuneavideo.config import checked
from tuneavideo.errors import RunError, SettingsError
from tuneavideo.settings import EditSettings, TuneSettings
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import Video, read, write
from tuneavideo.web.pages import forms
from tuneavideo.web.queue import CANCELLED, DONE, FAILED, WAITING, Queue
from tuneavideo.web.worker import begin


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root folder with a tuned run, and files outside."""
    root = tmp_path / "place" / "runs"
    (tmp_path / "place").mkdir()
    (tmp_path / "place/secret.mp4").write_text("secret")
    tuned_run(root)
    return root


@pytest.fixture
def page(root: Path) -> Generator[TestClient, None, None]:
    with client(root) as page:
        yield page


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outside(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(root.parent).items() if not name.startswith(root.name)}


def test_pages_are_shown_with_captions_as_text_and_a_strict_policy(page: TestClient) -> None:
    for path in ("/", CLIP, "/runs/dog-1", "/queue", "/?q=dog+script"):
        answer = page.get(path)
        assert answer.status_code == 200, path
        assert "<script>alert" not in answer.text and "<b>a dog" not in answer.text
        assert "style=" not in answer.text and "onclick" not in answer.text, "the policy would block it"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        for name in re.findall(r"/static/[\w.]+", answer.text):
            assert page.get(name).status_code == 200
        assert not re.search(r"(src|href)=.https?:", answer.text), "nothing comes from elsewhere"
    assert "&lt;b&gt;a dog&lt;/b&gt;" in page.get("/").text
    assert "No run matches" in page.get("/?q=giraffe").text


def test_a_clip_is_tuned_with_the_values_that_differ_from_the_defaults(page: TestClient, root: Path) -> None:
    shown = page.get(CLIP).text
    values = dict(re.findall(r'<input[^>]* name="(\w+)"[^>]*? value="([^"]*)"', shown))
    assert values["max_train_steps"] == "40" and values["learning_rate"] == "0.001"
    answer = page.post(f"{CLIP}/tune", data=values | FORM | {"max_train_steps": "60", "edit": "a cat\n\n a fox "})
    assert (answer.status_code, answer.headers["location"]) == (303, "/runs/dog-jumping-1")
    (request,) = Queue(root).waiting()
    settings = checked(TuneSettings, request.settings)
    assert (settings.max_train_steps, settings.edit, settings.sample_fps) == (60, ("a cat", "a fox"), 4)
    assert "gradient_accumulation_steps" not in settings.model_fields_set, "a default that was shown is not set"
    assert page.get("/runs/dog-jumping-1").status_code == 200, "it waits, and has no folder yet"
    assert page.post(f"{CLIP}/tune", data=FORM).headers["location"] == "/runs/dog-jumping-2"
    untrained = page.post(f"{CLIP}/tune", data=FORM | {"untrained": "1"})
    assert untrained.headers["location"] == "/runs/dog-jumping-untrained-1"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"max_train_steps": "0"}, "max_train_steps: input should be greater than 0"),
        ({"learning_rate": "fast"}, "learning_rate: input should be a valid number"),
        ({"base": "../../etc"}, "expected a base of the list"),
        ({"base": "/etc"}, "expected a base of the list"),
        ({"optimizer": "os.system"}, "optimizer: expected adamw"),
        ({"edit": "a cat\na cat"}, "given twice"),
        ({"num_frames": "x" * 5000}, "num_frames"),
    ],
)
def test_a_wrong_value_is_refused_in_the_words_of_the_command_line(
    change: dict[str, str], expected: str, page: TestClient, root: Path
) -> None:
    answer = page.post(f"{CLIP}/tune", data=FORM | change, headers={"accept": "application/json"})
    assert answer.status_code in (400, 404), answer.text
    if "base" not in change:
        assert expected in answer.text.replace("&#39;", "'")
    assert not Queue(root).all()


def test_edits_are_requested_varied_downloaded_and_deleted(page: TestClient, root: Path, tmp_path: Path) -> None:
    shown = page.get("/runs/dog-1").text
    assert "num inference steps 7" in shown and "seed 4" in shown
    answer = page.post("/runs/dog-1/edit", data={"prompt": "a cat\na fox", "strength": "0.8", "seeds": "3"})
    assert answer.status_code == 303
    (request,) = Queue(root).waiting()
    assert request.settings == {"prompt": ["a cat", "a fox"], "strength": "0.8", "seeds": ["3"]} or request.settings
    edit = RunFolder(root / "dog-1").whole_edits()[0]
    for form in ("mp4", "gif", "zip"):
        got = page.get(f"/runs/dog-1/edits/{edit.name}/download/{form}")
        assert got.status_code == 200 and "attachment" in got.headers["content-disposition"]
    mp4 = page.get(f"/runs/dog-1/edits/{edit.name}/download/mp4").content
    (tmp_path / "edit.mp4").write_bytes(mp4)
    assert np.array_equal(read(tmp_path / "edit.mp4").frames_THWC, read(edit / "edit.mp4").frames_THWC)
    sent = page.post("/clips?name=edit.mp4", content=mp4).json()
    values = page.post("/settings", data={"clip": sent["clip"]}).json()
    assert values["prompt"].startswith("<script>") and values["seeds"] == "4" and values["num_inference_steps"] == "7"
    assert page.get(f"/runs/dog-1/files/edits/{edit.name}/edit.mp4", headers={"range": "bytes=0-9"}).status_code == 206
    assert page.post(f"/runs/dog-1/edits/{edit.name}/delete").status_code == 303
    assert not edit.exists() and (root / "dog-1/source.mp4").is_file()


def test_a_run_is_deleted_only_when_no_job_works_in_it(page: TestClient, root: Path) -> None:
    with FileLock(root / "dog-1/.lock"):
        answer = page.post("/runs/dog-1/delete")
        assert answer.status_code == 400 and "is in use" in answer.text
    page.post("/runs/dog-1/edit", data={"prompt": "a cat"})
    assert "cancel them first" in page.post("/runs/dog-1/delete").text
    assert page.post("/jobs/1/cancel").status_code == 303
    assert page.post("/runs/dog-1/delete").status_code == 303
    assert not (root / "dog-1").exists() and not [*(root / ".web").glob("deleted*")]


def test_an_uploaded_clip_is_measured_shown_and_cut_to_the_frames_that_are_used(
    page: TestClient, tmp_path: Path
) -> None:
    path = encode(tmp_path / "a clip.mov", barcodes(24, 160, 96), rate=12)
    sent = page.post("/clips?name=..%2F..%2Fa+clip.MOV", content=path.read_bytes())
    assert sent.status_code == 201, sent.text
    place = sent.json()["page"]
    assert "160 × 96, 2 s, 12 frames a second" in page.get(place).text
    assert page.get(f"{place}/video").headers["content-type"] == "video/mp4"
    query = "base=miniature&num_frames=4&start_time=0.5&sample_fps=4"
    found = page.get(f"{place}/frames?{query}").json()
    assert found["times"] == [0.5, 0.75, 1.0, 1.25] and (found["width"], found["height"]) == (96, 64)
    assert found["picture"].startswith("data:image/jpeg;base64,")
    assert "No earlier run" not in page.get(f"{place}/estimate?{query}").json()["estimate"]
    assert "0.5 s a step" not in page.get(f"{place}/estimate?{query}").json()["estimate"], "half as many frames"
    assert page.post(f"{place}/delete").status_code == 303
    assert page.get(place).status_code == 404


def gif_of(width: int, height: int) -> bytes:
    """A GIF that declares a size and has no more than its header."""
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\xf7\x00\x00" + bytes(768) + b",\0\0\0\0"


def png_of(side: int) -> bytes:
    """A whole black PNG of one bit per pixel."""
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(side * (1 + side // 8)))),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def mov_of(side: int) -> bytes:
    """A video of one such picture, which has a few kB and decodes to almost a GB."""
    with io.BytesIO() as file, av.open(file, "w", format="mov") as container:
        stream = container.add_stream("png", rate=1)
        stream.width = stream.height = side
        stream.pix_fmt = "monob"
        packet = av.Packet(png_of(side))
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1)
        container.mux(packet)
        container.close()
        return file.getvalue()


UPLOADS = {
    "text": ("clip.mp4", b"hello"),
    "nothing": ("clip.mp4", b""),
    "a playlist": ("clip.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"),
    "a list of files": ("clip.mkv", b"ffconcat version 1.0\nfile /etc/passwd\n"),
    "a zip bomb": ("clip.mp4", b"PK\3\4" + zlib.compress(bytes(10**7))),
    "a wide picture": ("clip.gif", gif_of(65535, 65535)),
    "frames of 16,000 x 16,000": ("clip.mov", mov_of(16_000)),
    "a head only": ("clip.mp4", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom"),
    "a broken box": ("clip.mp4", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + b"\xff\xff\xff\xffmoov" + bytes(100)),
    "matroska noise": ("clip.webm", b"\x1aE\xdf\xa3" + bytes(range(256)) * 20),
    "riff noise": ("clip.avi", b"RIFF\xff\xff\xff\x7fAVI LIST" + bytes(5000)),
    "a program": ("clip.sh", b"#!/bin/sh\n"),
    "a page": ("clip.html", b"<script>alert(1)</script>"),
    "no ending": ("clip", b"GIF89a"),
    "a hidden name": ("..mp4", b"GIF89a"),
    "a NUL": ("a%00.mp4", b"GIF89a"),
}


@pytest.mark.parametrize("kind", UPLOADS)
def test_a_hostile_upload_is_refused_and_not_kept(kind: str, page: TestClient, root: Path) -> None:
    name, contents = UPLOADS[kind]
    before = outside(root)
    answer = page.post(f"/clips?name={name}", content=contents, headers={"accept": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"], answer.text
    assert "/" + str(root).strip("/") not in answer.text, "it names no path of the server"
    assert not [*(root / ".web/clips").iterdir()] and outside(root) == before


def test_a_clip_that_is_too_long_is_refused(page: TestClient, tmp_path: Path) -> None:
    path = encode(tmp_path / "long.mkv", barcodes(4), times=[0, 1, 2, 10_800])
    answer = page.post("/clips?name=long.mkv", content=path.read_bytes(), headers={"accept": "application/json"})
    assert answer.status_code == 400 and "at most 180 s" in answer.json()["error"]


PATHS = [
    "/runs/../secret.mp4", "/runs/%2e%2e/files/source.mp4", "/runs/..%2f..%2fetc/files/source.mp4",
    "/runs/dog-1/files/../../secret.mp4", "/runs/dog-1/files/..%2f..%2fsecret.mp4",
    "/runs/dog-1/files/edits/..%2f..%2f..%2fsecret.mp4", "/runs/dog-1/files//etc/passwd",
    "/runs/dog-1/files/settings.yaml", "/runs/dog-1/files/.lock", "/runs/dog-1/files/source.mp4%00",
    "/runs/DOG-1/files/source.mp4", "/runs/.web/files/source.mp4",
    "/runs/dog-1%00/files/source.mp4", "/runs/dog-1/edits/../download/mp4", "/runs/dog-1/edits/%2e%2e/download/mp4",
    "/runs/dog-1/edits/000-nothing/download/mp4", "/runs/dog-1/edits/000-nothing/download/exe",
    "/runs/link/files/source.mp4", "/runs/dog-1/files/edits/000-link/edit.mp4", "/runs/dog-1/files/edits.png",
    "/static/../app.py", "/static/%2e%2e%2fapp.py", "/static/app.py", "/clips/../secret/video",
    "/clips/%2e%2e%2f%2e%2e/video", "/clips/0123456789abcdef/video", "/clips/dog-jumping%00",
    "/compare?run=../secret", "/compare?run=link", "/compare", "/jobs/1/cancel", "/runs/" + "a" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_no_address_leads_out_of_the_root(path: str, page: TestClient, root: Path) -> None:
    other = root.parent / "other"
    (other / "edits").mkdir(parents=True)
    (other / "source.mp4").write_text("secret")
    (other / "edit.mp4").write_text("secret")
    (other / "settings.yaml").write_text("video: secret\nprompt: secret\n")
    (root / "link").symlink_to(other)
    (root / "dog-1/edits/000-link").symlink_to(other)
    (root / "dog-1/edits.png").symlink_to(other / "source.mp4")
    before = outside(root)
    answer = page.get(path)
    assert answer.status_code in (400, 404, 405), (path, answer.status_code)
    assert "secret" not in answer.text.replace("/secret", "") and outside(root) == before


REFUSED: dict[str, tuple[dict[str, str], int]] = {
    "another host": ({"host": "evil.example"}, 421),
    "a host that ends alike": ({"host": "localhost.evil.example:7860"}, 421),
    "no host": ({"host": ""}, 421),
    "a broken host": ({"host": "localhost:99999999"}, 421),
    "an address": ({"host": "8.8.8.8:7860"}, 421),
    "another origin": ({"origin": "http://evil.example"}, 403),
    "another port": ({"origin": "http://localhost:1"}, 403),
    "the origin null": ({"origin": "null"}, 403),
    "no origin": ({"origin": ""}, 403),
    "another site": ({"sec-fetch-site": "cross-site"}, 403),
    "a long body": ({"content-length": "99999999"}, 413),
    "a negative length": ({"content-length": "-1"}, 413),
    "a length of many digits": ({"content-length": "1" * 400}, 413),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_request_of_another_site_or_a_large_one_is_refused(kind: str, page: TestClient, root: Path) -> None:
    headers, status = REFUSED[kind]
    answer = page.post(f"{CLIP}/tune", content=b"prompt=x", headers=ORIGIN | headers)
    assert answer.status_code == status and len(answer.text) < 100
    assert not Queue(root).all()


def test_a_body_without_a_length_is_limited(page: TestClient, root: Path) -> None:
    answer = page.post(f"{CLIP}/tune", content=(b"x" * 2**14 for _ in range(100)))
    assert answer.status_code == 413 and not Queue(root).all()
    many = "&".join(f"a{number}=1" for number in range(500))
    assert page.post(f"{CLIP}/tune", content=many.encode()).status_code == 400


def test_a_token_is_needed_where_others_can_reach_the_page(root: Path) -> None:
    with client(root, token="right", hosts=["localhost"]) as page:
        for path in ("/", "/events", "/state", "/runs/dog-1/files/source.mp4", "/static/page.js"):
            assert page.get(path).status_code == 401
        for wrong in ("wrong", "", "right ", "RIGHT", "rïght"):
            assert page.get("/", params={"token": wrong}).status_code == 401
        assert page.post("/clips?token=right&name=a.mp4", content=b"x").status_code == 401
        answer = page.get("/queue?token=right&x=1")
        assert (answer.status_code, answer.headers["location"]) == (303, "/queue?x=1")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=lax" in cookie and "right" not in cookie
        assert page.get("/queue").status_code == 200, "the cookie is enough"
        page.cookies.clear()
        assert page.get("/", headers={"cookie": "tuneavideo-7860=wrong; a"}).status_code == 401


def test_requests_wait_run_and_end_once(root: Path) -> None:
    queue, other = Queue(root), Queue(root)
    first, second = queue.add("tune", "a clip", {}, is_new=True), queue.add("edit", "a-clip-1", {})
    third = queue.add("tune", "a clip", {}, is_new=True)
    assert (first.run, third.run) == ("a-clip-1", "a-clip-2")
    with queue.taken() as mine, other.taken() as theirs:
        assert mine and theirs
        assert (mine.id, theirs.id) == (first.id, third.id), "an edit waits for the tuning of its run"
        with Queue(root).taken() as none:
            assert none is None
    queue.finish(first.id, DONE)
    queue.set_state(third.id, CANCELLED)
    other.finish(third.id, DONE)
    assert queue.get(third.id).state == CANCELLED, "it was cancelled before"
    with queue.taken() as next_one:
        assert next_one and next_one.id == second.id
    queue.finish(second.id, FAILED, "why")
    assert queue.get(second.id).error == "why" and not queue.waiting()
    queue.set_state(second.id, WAITING)
    assert queue.get(second.id).error == ""
    with pytest.raises(RunError, match="there is no job 9"):
        queue.get(9)


def test_many_processes_take_each_request_once(root: Path) -> None:
    for number in range(30):
        Queue(root).add("edit", f"run-{number}", {})
    taken = list[int]()

    def work() -> None:
        queue = Queue(root)
        while queue.waiting():
            with queue.taken() as request:
                if request:
                    taken.append(request.id)
                    queue.finish(request.id, DONE)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 31))


def test_an_edit_whose_worker_ended_before_it_was_recorded_is_not_made_again(root: Path) -> None:
    queue, run = Queue(root), RunFolder(root / "dog-1")
    prompt = "<script>alert(1)</script> '\""
    request = queue.add("edit", "dog-1", {"prompt": [prompt], "seeds": [4], "num_inference_steps": 7})
    assert queue.begin_edits(request, 0) == queue.begin_edits(request, 5) == 0
    assert [*begin(request, queue)] == [], "it is there already"
    assert len(run.whole_edits()) == 1


def test_every_offered_setting_has_a_field_that_gives_its_default_back() -> None:
    for kind, values in (
        (TuneSettings, forms.tune_defaults("sd1.5")),
        (EditSettings, forms.defaults(EditSettings, {})),
    ):
        fields = [field for group in forms.groups(kind, values).values() for field in group]
        assert {field.name for field in fields} == {*forms.offered(kind)}
        assert all(field.help for field in fields)
        assert forms.read(kind, {field.name: field.value for field in fields}, values) == {}
    window = forms.field(EditSettings, "window", None)
    assert (window.kind, window.minimum, window.step) == ("number", 2, "1")
    assert forms.field(EditSettings, "sampler", "ddim").choices[1] == "dpm++"
    for text in ("", "{}", "[1]", '{"tuneavideo": {"prompt": 3}}', "x" * 9):
        with pytest.raises(SettingsError, match="no settings of tuneavideo"):
            forms.loaded(text)


def test_a_lock_is_seen_without_disturbing_its_holder(root: Path) -> None:
    run = RunFolder(root / "dog-1")
    with run.locked():
        assert RunFolder(root / "dog-1").is_in_use
    assert not run.is_in_use
    assert os.path.exists(run.path / ".lock")


def test_still_clips_and_one_frame_are_shown(page: TestClient, tmp_path: Path) -> None:
    write(Video(np.zeros((1, 32, 32, 3), np.uint8), 5.0), tmp_path / "one.mp4")
    sent = page.post("/clips?name=one.mp4", content=(tmp_path / "one.mp4").read_bytes())
    assert sent.status_code == 201 and page.get(sent.json()["page"]).status_code == 200
