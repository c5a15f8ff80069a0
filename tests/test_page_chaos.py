"""The page when processes are killed, when many use it, and when requests are malformed."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from tests.page_server import BRIEF, Server, served
from tuneavideo.storage.run_folder import RunFolder
from tuneavideo.video import read
from tuneavideo.web.queue import Queue

pytestmark = pytest.mark.long
TUNE = "/clips/dog-jumping/tune"


def requested(server: Server) -> None:
    """Request five jobs: three tunings, of which one with an edit, and two more edits."""
    for number in range(3):
        form = BRIEF | {"seed": str(number), "edit": "a cat is jumping on the grass" if number == 0 else ""}
        status, place = server.send(TUNE, form)
        assert (status, place) == (303, f"/runs/dog-jumping-{number + 1}")
        if number == 0:
            server.wait(1, ("done",))  # a run can be edited when it exists
    for prompts in ("a panda is jumping on the grass\na dog is jumping in the snow", "a fox is jumping on the grass"):
        assert server.send("/runs/dog-jumping-1/edit", {"prompt": prompts})[0] == 303


def results(root: Path) -> dict[str, np.ndarray]:
    """Return all adapters and edits of the runs."""
    found = dict[str, np.ndarray]()
    for path in sorted(root.glob("dog-jumping-*")):
        run = RunFolder(path)
        found |= {f"{path.name} {name}": each for name, each in load_file(run.adapter / "adapter.safetensors").items()}
        for edit in run.whole_edits():
            found[f"{path.name} {edit.name}"] = read(edit / "edit.mp4").frames_THWC
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    root = tmp_path_factory.mktemp("undisturbed")
    with served(root) as server:
        requested(server)
        assert {server.wait(number)["state"] for number in range(1, 6)} == {"done"}
    return results(root)


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_servers_and_workers_leave_jobs_that_end_once_with_the_same_results(
    kills: int, undisturbed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    seed = int(os.environ.get("TUNEAVIDEO_SEED", "0"))
    chance, server = random.Random(seed), Server(tmp_path)
    requested(server)
    done = 0
    while done < kills and Queue(tmp_path).waiting():
        time.sleep(chance.uniform(0, 10))
        kind = ("server", "worker", "both")[done % 3]
        workers = server.workers()
        if kind != "server":
            for worker in workers:
                worker.kill()
        if kind != "worker":
            server.kill()
            if kind == "both":
                psutil.wait_procs(workers, 10)
            server = Server(tmp_path)
        done += 1
    try:
        states = {number: server.wait(number) for number in range(1, 6)}
    finally:
        server.stop()
    failed = [job for job in states.values() if job["state"] == "failed"]
    assert all("the worker process ended 5 times" in job["error"] for job in failed), failed
    assert len(states) == 5 and {job["state"] for job in states.values()} <= {"done", "failed"}
    found = results(tmp_path)
    if not failed:
        assert found.keys() == undisturbed.keys(), "every edit is made once"
    for name, each in found.items():
        assert np.array_equal(each, undisturbed[name]), name
    assert not [*tmp_path.rglob("*.part")]


def test_many_browsers_request_jobs_that_all_end_while_streams_are_read(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        streams = [listening(server) for _ in range(200)]
        counts = Counter[int]()

        def request(browser: int) -> None:
            for number in range(4):
                form = BRIEF | {"max_train_steps": "2", "num_frames": "2", "seed": str(10 * browser + number)}
                counts[server.send(TUNE, form)[0]] += 1

        threads = [threading.Thread(target=request, args=(browser,)) for browser in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counts == {303: 20}
        assert {server.wait(number)["state"] for number in range(1, 21)} == {"done"}
        assert len([*tmp_path.glob("dog-jumping-*/adapter/adapter_config.json")]) == 20
        for stream in streams:
            stream.settimeout(5)
            assert b"event: job" in stream.recv(2**20)
            stream.close()


def listening(server: Server) -> socket.socket:
    """Return a connection that gets the events."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"GET /events HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
    return connection


def answered(server: Server, request: bytes, wait: float = 5.0) -> bytes:
    """Send bytes, and return what comes back until the connection closes or nothing comes."""
    host, port = server.url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port))) as connection:
        connection.settimeout(wait)
        try:
            connection.sendall(request)
            while chunk := connection.recv(2**16):
                received += chunk
        except OSError:
            pass
    return received


HEAD = b" HTTP/1.1\r\nHost: HOST\r\nOrigin: http://HOST\r\n"
RAW = {
    "parent folders": b"GET /runs/../../etc/passwd HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n",
    "encoded parents": b"GET /runs/%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n",
    "double encoding": b"GET /runs/%252e%252e/files/source.mp4 HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n",
    "backslashes": b"GET /runs/..\\..\\etc HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n",
    "control characters": b"GET /runs/%01%02%7f HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n",
    "bytes that are no text": b"GET /runs/\xff\xfe HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n",
    "invalid encoding": b"GET /runs/%ff%fe HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: HOST\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
    "no host": b"GET / HTTP/1.0\r\n\r\n",
    "an absolute address": b"GET http://evil.example/ HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
    "a long header": b"GET / HTTP/1.1\r\nHost: HOST\r\nX: " + b"x" * 2**20 + b"\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: HOST\r\n" + b"X: y\r\n" * 2**16 + b"\r\n",
    "a long address": b"GET /" + b"a" * 2**17 + b" HTTP/1.1\r\nHost: HOST\r\n\r\n",
    "an unknown method": b"BREW / HTTP/1.1\r\nHost: HOST\r\nOrigin: http://HOST\r\nConnection: close\r\n\r\n",
    "a deletion": b"DELETE /runs/a HTTP/1.1\r\nHost: HOST\r\nOrigin: http://HOST\r\nConnection: close\r\n\r\n",
    "noise": bytes(range(256)) * 20,
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "two lengths": b"POST /queue" + HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a wrong chunk": b"POST /clips?name=a.mp4" + HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a websocket": b"GET /events HTTP/1.1\r\nHost: evil\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
}  # fmt: skip


def test_malformed_requests_change_nothing_and_take_little_memory(tmp_path: Path) -> None:
    root, secret = tmp_path / "runs", tmp_path / "secret"
    secret.write_text("root:x:0")
    with served(root) as server:
        host = server.url.removeprefix("http://").encode()
        process = psutil.Process(server.process.pid)
        assert server.send("/")[0] == 200
        idle, most = process.memory_info().rss, 0
        for name, request in RAW.items():
            answer = answered(server, request.replace(b"HOST", host), 1.0)
            assert not answer.startswith(b"HTTP/1.1 2") and b"root:x:0" not in answer, name
            assert b"Traceback" not in answer, name
            most = max(most, process.memory_info().rss)
        slow = [socket.create_connection(host.split(b":")) for _ in range(50)]
        for connection in slow:
            connection.sendall(b"POST /clips/dog-jumping/tune HTTP/1.1\r\nHost: ")
        began = time.monotonic()
        assert server.send("/queue")[0] == 200 and time.monotonic() - began < 5, "others are served"
        for connection in slow:
            connection.close()
        head = f"POST /clips?name=a.mp4 HTTP/1.1\r\nHost: {host.decode()}\r\nOrigin: {server.url}\r\n"
        body = b"\0\0\0\x18ftypmp42" + os.urandom(2**20) * 64
        answer = answered(server, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, 60)
        assert answer.startswith(b"HTTP/1.1 400"), answer[:200]
        most = max(most, process.memory_info().rss)
        assert most - idle < 300 * 2**20
        assert not server.jobs() and not [*(root / ".web/clips").iterdir()]
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "secret"}


def test_a_page_of_others_admits_those_with_the_token_only(tmp_path: Path) -> None:
    with served(tmp_path, "--allow-host", "tune.example.org") as server:
        token = server.link.partition("?token=")[2]
        assert len(token) >= 32
        began, refused = time.monotonic(), 0
        while time.monotonic() - began < 2:
            refused += server.send(f"/?token={refused}")[0] == 401
        assert refused > 100
        assert server.send("/", cookie="tuneavideo=wrong")[0] == 401
        assert server.send(f"/?token={token}") == (303, "/")


def test_cancelled_and_paused_jobs_end_soon_and_runs_of_the_shell_appear(tmp_path: Path) -> None:
    with served(tmp_path) as server:
        assert server.send(TUNE, BRIEF | {"max_train_steps": "900"})[0] == 303
        server.wait(1, ("running",))
        while server.jobs()[1].get("stage") != "tune":
            time.sleep(0.1)
        began = time.monotonic()
        assert server.send("/jobs/1/pause", {})[0] == 303
        while Queue(tmp_path).get(1).state != "paused" or RunFolder(tmp_path / "dog-jumping-1").is_in_use:
            time.sleep(0.02)
        assert time.monotonic() - began < 10
        assert RunFolder(tmp_path / "dog-jumping-1").checkpoints(), "the steps are kept"
        assert server.send("/jobs/1/retry", {})[0] == 303
        server.wait(1, ("running",))
        began = time.monotonic()
        assert server.send("/jobs/1/cancel", {})[0] == 303
        assert server.wait(1)["state"] == "cancelled" and time.monotonic() - began < 4
        run = RunFolder(tmp_path / "dog-jumping-1")
        while run.is_in_use:
            time.sleep(0.02)
        with run.locked():
            assert server.send("/runs/dog-jumping-1/edit", {"prompt": "a cat"})[0] == 303
            job = server.wait(2, ("waiting", "failed"))
            assert "Another process" in server.send("/runs/dog-jumping-1")[1] or job
        failed = server.wait(2)
        assert failed["state"] == "failed" and "is not tuned to its end" in failed["error"]
