"""Copies of a process in which torch and the tests' models are at hand at once: to be limited and to be killed.

They are copies of a server that has never had a second thread, not of the tests' own process: a lock that another
thread holds while a process is copied stays locked in the copy for ever. So work is a function of a module, or a
`partial` of one.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
multiprocessing.set_forkserver_preload(["tests.conftest", "tuneavideo.cli.main", "tuneavideo.jobs.tune"])


@dataclass
class Fork:
    """A copy of the server that does `work` and ends; what it prints goes to `log`."""

    process: ForkServerProcess
    log: Path

    @classmethod
    def of(cls, work: Callable[[], object], log: Path) -> Fork:
        with contextlib.chdir(ROOT):  # from where the server can import the tests
            forkserver.ensure_running()
        process = ForkServerProcess(target=_told, args=(work, log.absolute(), dict(os.environ)), daemon=True)
        process.start()
        return cls(process, log)

    def ended(self, seconds: float) -> int | None:
        """Exit code, or the signal that killed it, negative; None if it still runs after `seconds`."""
        self.process.join(seconds)
        return self.process.exitcode

    def kill(self) -> int | None:
        self.process.kill()
        self.process.join()
        return self.process.exitcode


def run(work: Callable[[], object], log: Path, seconds: float = 120) -> tuple[int | None, str]:
    """Do `work` in a copy of the server; returns its exit code (None: it took too long) and what it printed."""
    fork = Fork.of(work, log)
    code = fork.ended(seconds)
    if code is None:
        fork.kill()
    return code, log.read_text(encoding="utf-8") if log.exists() else ""


def _told(work: Callable[[], object], log: Path, environment: dict[str, str]) -> None:
    """In the copy: where the tests are, under their environment, do the work and print into the log."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    threads = Path(f"/proc/{os.getppid()}/task")
    assert not threads.exists() or len(list(threads.iterdir())) == 1, "the server has one thread"
    os.environ.update(environment)
    gc.freeze()  # what the server holds need not be looked through, which would copy its pages
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, of which a kill would leave traces
    signal.signal(signal.SIGINT, signal.default_int_handler)
    work()
