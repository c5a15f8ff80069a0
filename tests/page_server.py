"""The page as a process of its own, and requests to it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

OVER = ("done", "failed", "cancelled")


class SameAnswer(urllib.request.HTTPRedirectHandler):
    """Redirects are answers of their own."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    """A running `tuneavideo web`; `url` is its address without the final slash."""

    def __init__(self, root: Path, *options: str, env: Mapping[str, str] | None = None) -> None:
        self.began = time.monotonic()
        words = [sys.executable, "-m", "tuneavideo", "web", "--root", str(root), "--port", "0", *options]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
        assert self.process.stdout, "it has a pipe"
        self.link = self.process.stdout.readline().strip()
        self.url = self.link.partition("/?")[0].rstrip("/")
        self.opener = urllib.request.build_opener(SameAnswer)

    def send(self, path: str, form: Mapping[str, Any] | bytes | None = None, **headers: str) -> tuple[int, str]:
        """Return status and text (or the new place) of a GET, or of a POST with a form or bytes."""
        data = urllib.parse.urlencode(form).encode() if isinstance(form, Mapping) else form
        request = urllib.request.Request(self.url + path, data, {"origin": self.url, **headers})
        try:
            with self.opener.open(request, timeout=60) as answer:
                return answer.status, answer.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.headers.get("location") or error.read().decode(errors="replace")

    def jobs(self) -> dict[int, dict[str, Any]]:
        return {job["job"]: job for job in json.loads(self.send("/state")[1])["jobs"]}

    def wait(self, number: int, states: Collection[str] = OVER, seconds: float = 240) -> dict[str, Any]:
        """Return a job when it is in one of some states."""
        end = time.monotonic() + seconds
        while (job := self.jobs()[number])["state"] not in states:
            assert time.monotonic() < end, job
            time.sleep(0.1)
        return job

    def workers(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children()
        return [each for each in found if "tuneavideo.web.worker" in each.cmdline()]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@contextmanager
def served(root: Path, *options: str, env: Mapping[str, str] | None = None) -> Generator[Server, None, None]:
    """Run the page until the block ends."""
    server = Server(root, *options, env=env)
    try:
        yield server
    finally:
        server.stop()


BRIEF = {
    "base": "miniature", "preset": "default", "prompt": "a dog is jumping on the grass", "num_frames": "4",
    "sample_fps": "4", "max_train_steps": "12", "num_inference_steps": "4",
}  # fmt: skip
