"""Copies of this process, in which torch and the tests' models are at hand at once: to be limited and to be killed."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Fork:
    """A copy of this process that does `work` and ends; what it prints goes to `log`."""

    pid: int
    log: Path

    @classmethod
    def of(cls, work: Callable[[], object], log: Path) -> Fork:
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            return cls(pid, log)
        code = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            work()
            code = 0
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def ended(self, seconds: float) -> int | None:
        """Exit code, or the signal that killed it, negative; None if it still runs after `seconds`."""
        until = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() >= until:
                return None
            time.sleep(0.005)

    def kill(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def run(work: Callable[[], object], log: Path, seconds: float = 120) -> tuple[int | None, str]:
    """Do `work` in a copy of this process; returns its exit code and what it printed."""
    fork = Fork.of(work, log)
    code = fork.ended(seconds)
    if code is None:
        fork.kill()
    return code, log.read_text(encoding="utf-8")
