"""Adapters that the page pushes to the hub, for which a server of the test stands."""

from __future__ import annotations

import json
import threading
import time
from base64 import b64decode
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.shared.page import client, tuned_run

TOKEN = "hf_" + "s3cret" * 6


class Hub(ThreadingHTTPServer):
    """A hub that takes what is uploaded: `tokens` of the requests, `files` by path, and answers to `refuse`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens, self.files, self.bodies = set[str](), dict[str, bytes](), list[dict[str, Any]]()
        self.refuse = False
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.tokens.add(self.headers["authorization"] or "")
        if self.server.refuse:
            return self.answer({"error": f"Invalid credentials {self.headers['authorization']}"}, 401)
        if self.path == "/api/repos/create":
            self.server.bodies.append(json.loads(body))
            return self.answer({"url": f"{self.server.url}/me/dog"})
        if self.path.endswith("/preupload/main"):
            names = [each["path"] for each in json.loads(body)["files"]]
            rest = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.answer({"files": [{"path": name, **rest} for name in names]})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = b64decode(line["value"]["content"])
            return self.answer({"success": True, "commitUrl": f"{self.server.url}/me/dog/commit/1", "commitOid": "1"})
        return self.answer({"warnings": [], "errors": []})

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers["authorization"] or "")
        self.answer({"siblings": [], "sha": "0", "id": "me/dog"})

    def answer(self, value: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[Hub, None, None]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        for name, value in (("HF_ENDPOINT", hub.url), ("HF_HUB_OFFLINE", "0"), ("HF_HOME", str(tmp_path / "hf")),
                            ("HF_HUB_DISABLE_XET", "1"), ("HF_TOKEN", "")):  # fmt: skip
            monkeypatch.setenv(name, value)
        yield hub
        hub.shutdown()


def pushed(root: Path, **form: str) -> str:
    """Push `dog-1` from the page, and return the page when the upload has ended."""
    with client(root) as page:
        answer = page.post("/runs/dog-1/push", data={"repository": "me/dog", "private": "on", **form})
        assert answer.status_code == 303, answer.text
        end = time.monotonic() + 120
        while 'data-state="running"' in (shown := page.get("/runs/dog-1").text):
            assert time.monotonic() < end
            time.sleep(0.1)
        return shown


def test_an_adapter_is_pushed_with_a_token_that_is_written_nowhere(
    hub: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tuned_run(tmp_path / "runs")
    config = json.loads((run.adapter / "adapter_config.json").read_text()) | {"base": "/home/me/secret/model"}
    (run.adapter / "adapter_config.json").write_text(json.dumps(config))
    shown = pushed(tmp_path / "runs", token=TOKEN)
    assert f'<a href="{hub.url}/me/dog"' in shown and TOKEN not in shown
    assert hub.tokens - {""} == {f"Bearer {TOKEN}"} and hub.bodies[0]["name"] == "dog"
    assert hub.files.keys() == {"README.md", "adapter_config.json", "adapter.safetensors"}
    assert hub.files["adapter.safetensors"] == (run.adapter / "adapter.safetensors").read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["base"] == "model", "no path of this computer"
    card = hub.files["README.md"].decode()
    assert "a dog" in card and "/home" not in card and str(tmp_path) not in card
    hub.refuse = True
    shown = pushed(tmp_path / "runs", token=TOKEN)
    assert "not pushed" in shown and "401" in shown and TOKEN not in shown
    hub.refuse = False
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    hub.tokens.clear()
    assert "pushed to" in pushed(tmp_path / "runs", token="")
    assert hub.tokens - {""} == {"Bearer hf_environment"}, "without a typed token that of the environment is taken"
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in "".join(capfd.readouterr())


def test_a_push_without_repository_or_adapter_is_refused(tmp_path: Path) -> None:
    run = tuned_run(tmp_path / "runs")
    with client(tmp_path / "runs") as page:
        for wrong in ("", "dog", "me/dog/x", "../dog", "me/..", "https://evil.example/x"):
            answer = page.post("/runs/dog-1/push", data={"repository": wrong, "token": TOKEN})
            assert answer.status_code == 400 and "expected a hub id" in answer.text and TOKEN not in answer.text
        (run.adapter / "adapter_config.json").unlink()
        answer = page.post("/runs/dog-1/push", data={"repository": "me/dog"})
        assert answer.status_code == 400 and "no adapter" in answer.text
