"""The page when processes are killed, when many use it, and when requests are malformed."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from tests.clips import encode
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
    chance, done, journey = random.Random(int(os.environ.get("TUNEAVIDEO_SEED", "0"))), 0, 0
    while done < kills:  # a journey may end before all kills are made: another one follows
        root, journey = tmp_path / str(journey), journey + 1
        done += disturbed(root, chance, done, kills, undisturbed)
    print(f"{done} kills in {journey} journeys")


def disturbed(root: Path, chance: random.Random, done: int, most: int, undisturbed: dict[str, np.ndarray]) -> int:
    """Request five jobs, kill processes until they end, check the results, and return the number of kills."""
    server, before = Server(root), done
    requested(server)
    while done < most and Queue(root).waiting():
        time.sleep(chance.uniform(0, 10))
        server = killed(server, root, ("server", "worker", "both", "computer")[done % 4])
        done += 1
    try:
        states = {number: server.wait(number) for number in range(1, 6)}
    finally:
        server.stop()
    failed = [job for job in states.values() if job["state"] == "failed"]
    assert all("the worker process ended 5 times" in job["error"] for job in failed), failed
    assert len(states) == 5 and {job["state"] for job in states.values()} <= {"done", "failed"}
    found = results(root)
    if not failed:
        assert found.keys() == undisturbed.keys(), "every edit is made once"
    for name, each in found.items():
        assert np.array_equal(each, undisturbed[name]), name
    assert not [*root.rglob("*.part")]
    return done - before


def killed(server: Server, root: Path, what: str) -> Server:
    """Kill the server, its worker, or both, or all processes at once as when a computer stops; return a server."""
    workers = server.workers()
    if what == "computer":
        processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
        for process in processes:
            process.suspend()
        for process in processes:
            process.kill()
    elif what != "server":
        for worker in workers:
            worker.kill()
    if what == "worker":
        return server
    server.kill()
    if what != "server":
        psutil.wait_procs(workers, 10)
    return Server(root)


@pytest.fixture
def small_disk(tmp_path: Path) -> Generator[Path, None, None]:
    """A file system of 64 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("file systems can be mounted by root only")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_jobs_fail_with_a_reason_on_a_full_disk_and_end_when_there_is_room(small_disk: Path) -> None:
    root, ballast = small_disk / "runs", small_disk / "ballast"

    def fill() -> None:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))

    with served(root) as server:
        clip = b"\0\0\0\x18ftypmp42" + bytes(1000)
        status, text = server.send("/clips?name=a.mp4", clip, accept="application/json")
        assert status == 400 and "the disk of the page is full" in text, "an upload leaves room for the runs"
        assert server.send(TUNE, BRIEF | {"max_train_steps": "300"})[0] == 303
        while server.jobs()[1].get("stage") != "tune":
            time.sleep(0.05)
        fill()
        status, text = server.send(TUNE, BRIEF)
        assert status in (303, 400) and (status == 303 or "make room" in text), "requests are kept or refused"
        assert server.send("/")[0] == 200, "the page can be read"
        end = time.monotonic() + 240
        while (job := server.jobs()[1])["state"] == "running" and "number" in job and job["number"] < 300:
            assert time.monotonic() < end, job
            time.sleep(0.1)
        time.sleep(2)
        ballast.unlink()
        job = server.wait(1)
        if job["state"] == "failed":
            assert any(words in job["error"] for words in ("No space left", "are free", "is full", "make room")), job
            assert server.send("/jobs/1/retry", {})[0] == 303
            assert server.wait(1)["state"] == "done"
        run = RunFolder(root / "dog-jumping-1")
        assert run.is_tuned and load_file(run.adapter / "adapter.safetensors")
        assert {job["state"] for job in server.jobs().values()} <= {"done", "failed", "waiting", "running"}
        assert not [*root.rglob("*.part")]


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
        head = f"HTTP/1.1\r\nHost: {host.decode()}\r\nOrigin: {server.url}\r\n"
        crawling = opened(server, f"POST /clips/dog-jumping/tune {head}Content-Length: 100\r\n\r\np".encode(), 20)
        for name, request in RAW.items():
            answer = answered(server, request.replace(b"HOST", host), 1.0)
            assert not answer.startswith(b"HTTP/1.1 2") and b"root:x:0" not in answer, name
            assert b"Traceback" not in answer, name
            most = max(most, process.memory_info().rss)
        slow = opened(server, b"POST /clips/dog-jumping/tune HTTP/1.1\r\nHost: ", 50)
        began = time.monotonic()
        assert server.send("/queue")[0] == 200 and time.monotonic() - began < 5, "others are served"
        for connection in slow:
            connection.close()
        body = b"\0\0\0\x18ftypmp42" + os.urandom(2**20) * 64
        answer = answered(
            server, f"POST /clips?name=a.mp4 {head}Content-Length: {len(body)}\r\n\r\n".encode() + body, 60
        )
        assert answer.startswith(b"HTTP/1.1 400"), answer[:200]
        for connection in crawling:
            connection.settimeout(60)
            assert b"408" in connection.recv(2**16).partition(b"\r\n")[0], "a body that does not come is given up"
            connection.close()
        most = max(most, process.memory_info().rss)
        assert most - idle < 300 * 2**20
        assert not server.jobs() and not [*(root / ".web/clips").iterdir()]
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "secret"}


def opened(server: Server, request: bytes, count: int) -> list[socket.socket]:
    """Return connections on which the beginning of a request was sent."""
    host, port = server.url.removeprefix("http://").split(":")
    connections = [socket.create_connection((host, int(port))) for _ in range(count)]
    for connection in connections:
        connection.sendall(request)
    return connections


def test_a_clip_of_very_many_frames_takes_little_memory(tmp_path: Path) -> None:
    clip = encode(tmp_path / "many.mp4", [*np.zeros((16_384, 16, 16, 3), np.uint8)], rate=100)
    with served(tmp_path / "runs") as server:
        process = psutil.Process(server.process.pid)
        assert server.send("/")[0] == 200
        idle = process.memory_info().rss
        status, text = server.send("/clips?name=many.mp4", clip.read_bytes(), accept="application/json")
        assert status == 201, text
        place = json.loads(text)["page"]
        for path in ("", "/frames?num_frames=16384", "/video"):
            assert server.send(place + path, accept="application/json")[0] in (200, 400), path
        assert process.memory_info().rss - idle < 300 * 2**20


def test_a_page_of_others_admits_those_with_the_token_only_while_others_guess(tmp_path: Path) -> None:
    with served(tmp_path, "--allow-host", "tune.example.org") as server:
        token, process = server.link.partition("?token=")[2], psutil.Process(server.process.pid)
        assert len(token) >= 32
        assert server.send("/", cookie="tuneavideo=wrong")[0] == 401
        assert server.send(f"/?token={token}") == (303, "/")
        host = server.url.removeprefix("http://")
        idle, connections = process.memory_info().rss, opened(server, b"", 10)
        began, refused, times = time.monotonic(), 0, list[float]()
        for turn in range(30):
            for number, connection in enumerate(connections):
                guess = f"GET /?token={turn}{number} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
                connection.sendall(guess * 10)
            before = time.monotonic()
            assert server.send(f"/?token={token}")[0] == 303
            times.append(time.monotonic() - before)
            for connection in connections:
                answer = b""
                while answer.count(b"printed\n") < 10:
                    answer += connection.recv(2**16)
                refused += answer.count(b"HTTP/1.1 401")
        print(f"{refused / (time.monotonic() - began):.0f} guesses a second, {max(times):.3f} s for the user")
        assert refused == 3000 and max(times) < 5
        assert process.memory_info().rss - idle < 300 * 2**20
        for connection in connections:
            connection.close()


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
