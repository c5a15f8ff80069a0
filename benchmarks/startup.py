"""Time of `tune` to its first step with a cached clip; writes benchmarks/results/startup.json.

    python -m benchmarks.startup CLIP [--base build/sd15-sized]
    python -m benchmarks.startup --imports      which packages the imports take

The clip is tuned once, so that it is cached, and once more in a fresh process: seconds of the imports, of loading the
base, and of everything else up to the beginning of the first step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "startup.json"
PACKAGES = ("torch", "torch._dynamo", "peft", "scipy.stats", "transformers", "accelerate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path, nargs="?")
    parser.add_argument("--imports", action="store_true", help="list the packages instead")
    parser.add_argument("--base", default="miniature")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_started(options.clip, options.base, options.child)))
        return
    if options.imports:
        return _save("packages", _packages())
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.startup", str(options.clip), "--base", options.base]
    with tempfile.TemporaryDirectory() as work:
        for number in ("first", "again"):
            output = subprocess.run(
                [*words, "--child", f"{work}/{number}"], check=True, stdout=subprocess.PIPE, text=True
            )
    _save(Path(options.base).name, json.loads(output.stdout.splitlines()[-1]))


def _save(name: str, row: dict[str, float]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results[name] = row
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(RESULTS.read_text())


def _packages() -> dict[str, float]:
    """Return the seconds of the imports of `tune`, in all and of PACKAGES with what each imports first."""
    words = [sys.executable, "-X", "importtime", "-W", "ignore", "-c", "import tuneavideo.jobs.tune"]
    lines = subprocess.run(words, check=True, capture_output=True, text=True).stderr.splitlines()
    found = [line.split("|") for line in lines if line.startswith("import time:") and line.count("|") == 2]
    times = {name.strip(): int(whole) / 1e6 for _, whole, name in found if whole.strip().isdigit()}
    return {name: round(times[name], 2) for name in ("tuneavideo.jobs.tune", *PACKAGES)}


def _started(clip: Path, base: str, out: Path) -> dict[str, float]:
    """Return the seconds of each stage to the first step, after which the job is stopped."""
    began = time.perf_counter()
    import tuneavideo.jobs.tune  # noqa: F401
    from tuneavideo import api
    from tuneavideo.models import pipelines

    imported = time.perf_counter()
    load_image_pipeline, loading = pipelines.load_image_pipeline, 0.0

    def timed(*given: object, **more: object) -> object:
        nonlocal loading
        start = time.perf_counter()
        try:
            return load_image_pipeline(*given, **more)  # pyright: ignore
        finally:
            loading += time.perf_counter() - start

    pipelines.load_image_pipeline = timed  # pyright: ignore
    size = {} if base == "miniature" else {"resolution": 128, "num_frames": 8}
    job = api.Job.tune(
        api.tune_settings({"video": str(clip), "prompt": "a man is skiing", "base": base, **size}), out=out
    )
    for each in job:
        if each.step:
            whole = time.perf_counter() - imported - each.step.seconds
            job.close()
            return {"imports": imported - began, "loading": loading, "rest": whole - loading}
    raise SystemExit("no step was made")


if __name__ == "__main__":
    main()
