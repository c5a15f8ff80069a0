"""Environment of the program: versions, devices, free space and missing parts, for a bug report.

torch runs in a subprocess: `doctor` has to work where importing torch fails or ends the process.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from tuneavideo.models import host_memory
from tuneavideo.storage import atomic

VARIABLES = ("CUDA_VISIBLE_DEVICES", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS",
        "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TUNEAVIDEO_CACHE", "XDG_CACHE_HOME")  # fmt: skip
TORCH_TIMEOUT = 120
TORCH_SCRIPT = """
import json, torch
kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
devices = []
for index in range(torch.accelerator.device_count() if kind else 0):
    device = {"name": f"{kind.type}:{index}"}
    if kind.type == "cuda":
        free, total = torch.cuda.mem_get_info(index)
        device |= {"model": torch.cuda.get_device_name(index), "free": free, "total": total,
                   "bf16": torch.cuda.is_bf16_supported(including_emulation=False)}
    devices.append(device)
cpu = getattr(torch.cpu, "get_capabilities", dict)()
print(json.dumps({"built for": torch.version.cuda or torch.version.hip or "cpu", "threads": torch.get_num_threads(),
                  "devices": devices, "cpu bf16": bool(cpu.get("amx_bf16") or cpu.get("avx512_bf16"))}))
"""


def examined() -> dict[str, Any]:
    """Examine the environment; user names and home folders are removed from paths.

    Returns:
        The findings by name. Entries of `missing` have `what`, `remedy`, and whether tuning is `impossible` without.
    """
    torch = _torch()
    free, total = host_memory.free_and_total()
    packages: dict[str, str | None] = {}
    missing: list[dict[str, Any]] = []

    def miss(what: str, remedy: str, impossible: bool) -> None:
        missing.append({"what": what, "remedy": remedy, "impossible": impossible})

    for requirement, extra in _requirements():
        packages[requirement.name] = found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            what = f"{requirement.name} {found or 'is not installed'}" + (f" (for {extra})" if extra else "")
            miss(what, f"pip install '{requirement}'", not extra)
    if packages.get("torch") and "error" in torch:
        miss(
            f"torch is broken: {torch['error']}", "pip install --force-reinstall torch (see https://pytorch.org)", True
        )
    elif shutil.which("nvidia-smi") and not torch.get("devices"):
        miss("an NVIDIA driver, but torch sees no GPU", "install torch for your CUDA (see https://pytorch.org)", False)
    found = {
        "tuneavideo": _version("tuneavideo") or "not installed",
        "python": f"{platform.python_version()} {sys.executable}",
        "system": platform.platform(),
        "packages": packages,
        "torch": torch,
        "cores": os.cpu_count(),
        "memory": {"free": free, "total": total},
        "runs": {"folder": str(Path("runs").absolute()), "free": atomic.free(Path("runs"))},
        "cache": _folder(atomic.cache_folder()),
        "hub": _hub(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "missing": missing,
    }
    return json.loads(_anonymous(json.dumps(found)))


def lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the findings of `examined` as lines for the terminal."""
    size = atomic.size
    yield f"tuneavideo  {found['tuneavideo']}, Python {found['python']}, {found['system']}"
    yield "packages    " + ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    torch = found["torch"]
    yield "torch       " + (torch.get("error") or f"built for {torch['built for']}, {torch['threads']} threads")
    for device in torch.get("devices", ()):
        memory = f", {size(device['free'])} of {size(device['total'])} free" if "total" in device else ""
        bf16 = {True: ", bf16", False: ", no bf16", None: ""}[device.get("bf16")]
        yield f"device      {device['name']} {device.get('model', '')}{memory}{bf16}"
    yield f"device      cpu, {found['cores']} cores" + (", bf16" if torch.get("cpu bf16") else "")
    yield f"memory      {size(found['memory']['free'])} of {size(found['memory']['total'])} free"
    yield f"runs        {found['runs']['folder']}: {size(found['runs']['free'])} free"
    for name in ("cache", "hub"):
        place = found[name]
        offline = ", offline: nothing is downloaded" if place.get("offline") else ""
        yield f"{name:<11} {place['folder']}: holds {size(place['size'])}, {size(place['free'])} free{offline}"
    for name, value in found["environment"].items():
        yield f"set         {name}={value}"
    for each in found["missing"]:
        yield f"{'MISSING' if each['impossible'] else 'optional':<11} {each['what']}: {each['remedy']}"
    if not any(each["impossible"] for each in found["missing"]):
        yield "all that tuning needs is here"


def _torch() -> dict[str, Any]:
    """Return properties of torch and its devices, or the `error` of the subprocess."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", TORCH_SCRIPT], capture_output=True, text=True, timeout=TORCH_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return {"error": f"does not answer within {TORCH_TIMEOUT} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1] if lines else f"ends its process with {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _requirements() -> Iterator[tuple[Requirement, str]]:
    """Yield the packages that this one requires, each with its extra; those of developers are left out."""
    try:
        declared = requires("tuneavideo") or []
    except PackageNotFoundError:
        declared = []
    for requirement in map(Requirement, declared):
        marker, requirement.marker = requirement.marker, None
        extra = re.search(r"extra == [\"'](.+?)[\"']", str(marker))
        if not extra or extra[1] != "dev":
            yield requirement, extra[1] if extra else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _folder(path: Path) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    return {"folder": str(path), "size": size, "free": atomic.free(path)}


def _hub() -> dict[str, Any]:
    try:
        from huggingface_hub import constants
    except ImportError:
        return _folder(Path.home() / ".cache/huggingface/hub") | {"offline": False}
    return _folder(Path(constants.HF_HUB_CACHE)) | {"offline": constants.HF_HUB_OFFLINE}


def _anonymous(text: str) -> str:
    """Replace the home folder and, in other paths, the user's name."""
    home = os.path.expanduser("~")
    if not os.path.basename(home):
        return text
    text = re.sub(rf"{re.escape(json.dumps(home)[1:-1])}(?=\W)", "~", text)
    return re.sub(rf"(?<=[/\\]){re.escape(os.path.basename(home))}(?=\W)", "USER", text)
