"""Batches on a Ray cluster of this machine, and in object storage, while nodes, drivers and storage fail."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.batch_jobs import STUB, contents_of, job_file, run_all, written
from tests.conftest import Said
from tuneavideo.batch import object_storage
from tuneavideo.batch.batch import Batch
from tuneavideo.batch.cluster import ClusterRunner, gpu_fraction
from tuneavideo.batch.job_file import read_jobs
from tuneavideo.batch.job_run import run_job
from tuneavideo.batch.pool import Pool
from tuneavideo.errors import DiskError

STORE = 80 * 2**20  # bytes of a node's object store


# Object storage


class Faulty:
    """An S3 server that answers 503 while `failing`, and counts these answers."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.app = DomainDispatcherApplication(create_backend_app)
        self.failing, self.refused = threading.Event(), 0
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __call__(self, environ: dict[str, Any], start: Any) -> Any:
        if not self.failing.is_set():
            return self.app(environ, start)
        self.refused += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start("503 Slow Down", [("Content-Type", "text/xml")])
        return [b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>"]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Faulty]]:
    """A bucket of a local S3 server, and the server."""
    import s3fs

    server = Faulty()
    own = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server.port}", "AWS_ACCESS_KEY_ID": "test",
           "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
           "TUNEAVIDEO_SCRATCH": str(tmp_path_factory.mktemp("scratch"))}  # fmt: skip
    before = dict(os.environ)
    os.environ.update(own)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("clips")
    yield "s3://clips", server
    os.environ.clear()
    os.environ.update(before)
    server.server.shutdown()


def downloaded(url: str, folder: Path) -> Path:
    files, path = object_storage._file_system(url)
    files.invalidate_cache()
    files.get(path, str(folder), recursive=True)
    return folder


@pytest.mark.long
def test_runs_in_object_storage_are_those_on_a_disk_and_continue_from_the_last_upload(
    storage: tuple[str, Faulty], base: Path, tmp_path: Path
) -> None:
    bucket, _ = storage
    file, root = job_file(tmp_path, base), f"{bucket}/continued"
    (job,) = read_jobs(file)
    Batch.of(file, root).root.prepare()
    whole = run_all(file, tmp_path / "disk")
    copies = object_storage.scratch(root)
    *_, last = run_job(job, root, False, lambda: bool([*copies.glob("*/checkpoints/*.pt")]))
    assert last == {"state": "stopped"} and Batch.of(file, root).states == {job.id: "begun"}
    assert not [*copies.glob("*")], "copies are removed"
    left = downloaded(f"{root}/{job.name}", tmp_path / "left")
    assert (left / "steps.jsonl").is_file() and [*left.glob("checkpoints/*.pt")]
    assert [*run_job(job, root, False, lambda: False)][-1]["state"] == "done"
    found = downloaded(root, tmp_path / "found")
    assert contents_of(found) == contents_of(tmp_path / "disk")
    assert not [*found.rglob("checkpoints")], "what a finished run has no more is removed"
    batch = Batch.of(file, root)
    assert batch.due() == [] and batch.rows[job.id][0]["file"] == whole[job.name]["rows"][0]["file"]
    assert batch.root.write_results(b"") == f"{root}/results.parquet"


def test_what_a_worker_made_before_its_upload_failed_is_never_deleted(tmp_path: Path) -> None:
    import fsspec

    files, far, near = fsspec.filesystem("file", auto_mkdir=True), tmp_path / "far", tmp_path / "near"
    mirror = object_storage.Mirror(files, str(far), near)
    mirror.download()
    near.mkdir()
    (near / "steps.jsonl").write_text("1")
    mirror.upload()
    (near / "adapter.safetensors").write_text("finished")  # the storage fails, or the worker is killed, here
    again = object_storage.Mirror(files, str(far), near)
    again.download()
    assert (near / "adapter.safetensors").read_text() == "finished", "it goes on from there"
    again.upload()
    assert (far / "adapter.safetensors").read_text() == "finished"
    assert not [*far.glob(".*")]
    (near / "edit.mp4").write_text("only here")
    (far / "steps.jsonl").write_text("of another machine")
    object_storage.Mirror(files, str(far), near).download()
    assert (near / "steps.jsonl").read_text() == "of another machine" and not (near / "edit.mp4").exists()
    assert (tmp_path / "near.1" / "edit.mp4").read_text() == "only here"


@pytest.mark.long
def test_storage_that_answers_503_is_tried_again_and_a_bucket_that_is_not_there_is_one_line(
    storage: tuple[str, Faulty], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, server = storage
    file, root = job_file(tmp_path, base), f"{bucket}/faulty"
    (job,) = read_jobs(file)
    import s3fs

    monkeypatch.setattr(object_storage, "LONGEST_WAIT", 0.5)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # its own
    server.failing.set()
    threading.Timer(3, server.failing.clear).start()
    assert [*run_job(job, root, False, lambda: False)][-1]["state"] == "done"
    assert server.refused > 0 and Batch.of(file, root).due() == []
    monkeypatch.setattr(object_storage, "GIVE_UP", 1.0)
    server.failing.set()
    try:
        (end,) = [*run_job(job, f"{bucket}/down", False, lambda: False)]
        assert end["state"] == "failed" and "s3://clips/down cannot be used" in end["error"]
    finally:
        server.failing.clear()
    with pytest.raises(DiskError, match="s3://no-such-bucket cannot be used"):
        Batch.of(file, "s3://no-such-bucket").root.prepare()


@pytest.mark.long
def test_a_clip_in_object_storage_is_fetched(storage: tuple[str, Faulty], base: Path, tmp_path: Path) -> None:
    bucket, _ = storage
    clips = [{"video": f"{bucket}/in/{name}.mp4", "prompt": "a square"} for name in ("square", "missing")]
    file = job_file(tmp_path, base, clips=clips)
    files, path = object_storage._file_system(f"{bucket}/in/square.mp4")
    files.put_file(str(tmp_path / "square.mp4"), path)
    ends = {job.video: [*run_job(job, str(tmp_path / "runs"), False, lambda: False)][-1] for job in read_jobs(file)}
    assert ends[clips[0]["video"]]["state"] == "done"
    assert "s3://clips/in/missing.mp4 cannot be read" in ends[clips[1]["video"]]["error"]


# Clusters


def test_jobs_that_set_their_memory_share_a_gpu() -> None:
    assert gpu_fraction(24, int(141e9)) == 1 / 5 and gpu_fraction(24, int(24e9)) == 1 == gpu_fraction(24, int(16e9))


class LocalCluster:
    """A Ray cluster of two nodes on this machine, each with one CPU."""

    def __init__(self) -> None:
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False},
        )
        self.nodes = [self.cluster.head_node]
        self.add()

    @property
    def address(self) -> str:
        return self.cluster.address

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=STORE))

    def kill(self, number: int) -> None:
        """Kill a node as a crash does, with all its processes."""
        self.cluster.remove_node(self.nodes[number], allow_graceful=False)


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    made = LocalCluster()
    yield made
    made.cluster.shutdown()


def command(*words: str) -> subprocess.Popen:
    whole = [sys.executable, "-m", "tuneavideo", "batch", *words, "--json"]
    return subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ends_of(lines: list[str]) -> Counter[str]:
    """Return how often each job was done."""
    events = [json.loads(line) for line in lines]
    return Counter(each["job"] for each in events if each["event"] == "job" and each["state"] == "done")


@pytest.mark.slow
def test_nodes_and_drivers_that_die_leave_each_job_done_once_with_the_results_of_a_sequential_run(
    cluster: LocalCluster, base: Path, tmp_path: Path
) -> None:
    """24 jobs; a node is killed, then the driver, then the rest is run."""
    file = job_file(tmp_path, base, grid={"seed": [*range(24)]})
    runs, whole = tmp_path / "runs", tmp_path / "whole"
    run_all(file, whole)
    words = (str(file), "--out", str(runs), "--ray", cluster.address)
    driver, lines = command(*words), list[str]()
    for line in driver.stdout:
        lines.append(line)
        done = sum(ends_of(lines).values())
        if done == 6 and len(cluster.nodes) == 2:
            cluster.kill(1)
            cluster.nodes.append(None)
        if done >= 14:
            driver.kill()
            break
    lines += driver.stdout.read().splitlines()
    driver.wait()
    before = ends_of([line for line in lines if line.endswith("}") or line.endswith("}\n")])
    again = command(*words)
    rest, errors = again.communicate(timeout=600)
    assert again.returncode == 0, errors
    after = ends_of(rest.splitlines())
    assert max((before + after).values()) == 1, "no job is done twice"
    assert len(before | after) >= 23, "one may have ended as the driver was killed"
    end = json.loads(rest.splitlines()[-1])
    assert end["done"] == 24 and contents_of(runs) == contents_of(whole)


@pytest.mark.slow
def test_a_head_node_that_dies_is_one_line_and_the_batch_continues_on_the_next_cluster(
    base: Path, tmp_path: Path
) -> None:
    file = job_file(tmp_path, base, grid={"seed": [0, 1, 2]})
    first = LocalCluster()
    driver = command(str(file), "--out", str(tmp_path / "runs"), "--ray", first.address)
    for line in driver.stdout:
        if sum(ends_of([line]).values()):
            break
    first.cluster.head_node.kill_gcs_server()
    _, errors = driver.communicate(timeout=200)
    assert driver.returncode == 2 and "does not answer; what was made is kept; go on with the same command" in errors
    first.cluster.shutdown()
    second = LocalCluster()
    again = command(str(file), "--out", str(tmp_path / "runs"), "--ray", second.address)
    output, errors = again.communicate(timeout=600)
    second.cluster.shutdown()
    assert again.returncode == 0, errors
    assert json.loads(output.splitlines()[-1])["done"] == 3


@pytest.mark.long
def test_actors_that_die_are_replaced_and_a_stopped_batch_ends(cluster: LocalCluster, tmp_path: Path) -> None:
    prompts = ["die once", "raise", *["sleep 0.2"] * 8]
    clips = [{"video": f"{number}.mp4", "prompt": prompt} for number, prompt in enumerate(prompts)]
    jobs = read_jobs(written(tmp_path / "jobs.yaml", clips=clips))
    runner = ClusterRunner(Pool(jobs), jobs, str(tmp_path), cluster.address, scores=False, work=STUB)
    ends = [each for each in runner.messages() if each and each["state"] in ("done", "failed")]
    assert Counter(end["state"] for end in ends) == {"done": 9, "failed": 1}
    assert len({end["worker"] for end in ends}) >= 2, "both nodes had jobs"
    jobs = read_jobs(written(tmp_path / "jobs.yaml", clips=[{"video": "a.mp4", "prompt": "sleep 60"}]))
    runner = ClusterRunner(Pool(jobs), jobs, str(tmp_path), cluster.address, scores=False, work=STUB)
    states = list[str]()
    for message in runner.messages():
        states += [message["state"]] if message else []
        if message and message.get("stage") == "tune":
            runner.stop()
    assert states[-1] == "stopped"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_address_without_a_cluster_is_one_line(base: Path, tmp_path: Path, refused: Said) -> None:
    file, address = job_file(tmp_path, base), f"127.0.0.1:{free_port()}"
    line = refused(["batch", str(file), "--out", str(tmp_path / "runs"), "--ray", address])
    assert line.startswith(f"no Ray cluster answers at {address}: ") and "Connection refused" in line
