"""Shared parts of the trainings: processes, a schedule in steps, resumable states."""

from __future__ import annotations

import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tools.miniature.muon import Pair
from tools.miniature.world import Scene, World
from torch import Tensor, nn

ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296"
"""Keep freed memory, in large pages: a quarter more pictures a second on a CPU. Read when a process starts."""
LONGEST_STEP = 20.0
"""Seconds; what a step takes beyond this was a pause and is not work."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a training: folder of its state, device, number of steps, seed."""

    build: Path
    steps: int
    batch: int
    rate: float
    device: str = "cpu"
    processes: int = 1
    seed: int = 0
    save_every: float = 120.0
    """Seconds between two states on disk."""


@dataclass(slots=True)
class Clock:
    """Seconds of work so far."""

    worked: float = 0.0
    _last: float = field(default_factory=time.monotonic)

    def tick(self) -> None:
        """Count the time since the last tick, pauses left out."""
        now = time.monotonic()
        self.worked += min(now - self._last, LONGEST_STEP)
        self._last = now


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def in_processes(work: Callable[[Settings], None], settings: Settings) -> None:
    """Run `work` in as many processes as the settings say, each with one thread; they share gradients."""
    if settings.processes == 1:
        work(settings)
        return
    meeting = settings.build / f"meeting-{os.getpid()}"
    (settings.build / "pids").unlink(missing_ok=True)
    os.environ.setdefault("GLIBC_TUNABLES", ALLOCATOR)
    torch.multiprocessing.spawn(_join, (work, settings, meeting), nprocs=settings.processes)
    meeting.unlink(missing_ok=True)


def _join(number: int, work: Callable[[Settings], None], settings: Settings, meeting: Path) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", f"file://{meeting.resolve()}", timeout=timedelta(hours=12), rank=number, world_size=settings.processes
    )
    with (settings.build / "pids").open("a") as pids:
        pids.write(f"{os.getpid()}\n")
    work(settings)
    dist.destroy_process_group()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make gradients the mean over all processes."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for g, mean in zip(gradients, (flat / world_size()).split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))


def set_rate(optimizer: Pair, highest: float, progress: float, warm: float = 0.02) -> None:
    """Linear warm-up, then a cosine that ends at a hundredth."""
    scale = min(progress / warm, 1.0) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
    for group in optimizer.param_groups:
        group["lr"] = highest * scale


def save(state: dict[str, Any], file: Path) -> None:
    """Write a state atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file.with_suffix(".part"))
    os.replace(file.with_suffix(".part"), file)


def load(file: Path) -> dict[str, Any] | None:
    return torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None


class Log:
    """Lines in a file and on the terminal, from the first process only."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, line: str) -> None:
        if rank() == 0:
            stamped = f"{time.strftime('%H:%M:%S', time.gmtime())} {line}"
            print(stamped, flush=True)
            with self.file.open("a") as log:
                log.write(stamped + "\n")


class Run:
    """A training that can be stopped at any time and resumes from its last state on disk, `<name>.pt`.

    Iterating gives the number of each step and the share of the steps that are taken; the loop's body takes the
    step and calls `learned` with its loss.
    """

    def __init__(self, settings: Settings, name: str, optimizer: Pair, **modules: nn.Module) -> None:
        self.settings, self.optimizer, self.modules = settings, optimizer, modules
        self.file, self.log = settings.build / f"{name}.pt", Log(settings.build / f"{name}.log")
        self.clock, self.step, self.seen = Clock(), 0, 0
        self.losses: deque[float] = deque(maxlen=50)
        if state := load(self.file):
            for key, module in modules.items():
                module.load_state_dict(state[key])
            optimizer.load_state_dict(state["optimizer"])
            self.clock.worked, self.step, self.seen = state["worked"], state["step"], state["seen"]

    def __iter__(self) -> Iterator[tuple[int, float]]:
        saved, steps = self.clock.worked, self.settings.steps
        while self.step < steps:
            set_rate(self.optimizer, self.settings.rate, self.step / steps)
            yield self.step, self.step / steps
            self.step, self.seen = self.step + 1, self.seen + self.settings.batch * world_size()
            self.clock.tick()
            if self.step % 50 == 0:
                self.log(f"step {self.step} of {steps}, loss {sum(self.losses) / len(self.losses):.4f}")
            if self.clock.worked - saved > self.settings.save_every or self.step == steps:
                saved = self.clock.worked
                self.save()

    def learned(self, loss: float) -> None:
        self.losses.append(loss)

    def save(self) -> None:
        """Write the state, from the first process only."""
        if rank() == 0:
            state = {"step": self.step, "worked": self.clock.worked, "seen": self.seen}
            state |= {key: module.state_dict() for key, module in self.modules.items()}
            save(state | {"optimizer": self.optimizer.state_dict()}, self.file)


def learn(run: Run, loss: Tensor, parameters: Iterable[nn.Parameter], highest_norm: float = 1.0) -> None:
    """One step of the optimizer, with gradients shared by all processes and no longer than `highest_norm`."""
    parameters = list(parameters)
    loss.backward()
    average_gradients(parameters)
    nn.utils.clip_grad_norm_(parameters, highest_norm)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.learned(loss.item())


def pictures(world: World, scenes: Iterable[Scene], device: str = "cpu") -> Tensor:
    """Draw scenes, `N 3 64 64` in -1..1."""
    drawn = np.stack([world.draw(scene) for scene in scenes])
    return torch.from_numpy(drawn).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def generator(*parts: object) -> random.Random:
    """Make a generator whose seed depends on the arguments only, so that resuming repeats the numbers."""
    return random.Random(" ".join(map(str, parts)))
