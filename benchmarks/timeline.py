"""The command line in this process, with the time of every stage; prints them as JSON.

    python -m benchmarks.timeline tune CLIP ...

Imports nothing but the standard library beforehand, so that the time of a command is that of the command.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any
from unittest.mock import patch


def main() -> None:
    from tuneavideo.cli import console
    from tuneavideo.cli.main import main as run
    from tuneavideo.progress import Progress

    began, show = time.time(), console.Show._show
    firsts, lasts, steps, plans = dict[str, float](), dict[str, float](), list[float](), list[str]()

    def noted(self: Any, bar: Any, each: Progress) -> None:
        firsts.setdefault(each.stage, time.time())
        lasts[each.stage] = time.time()
        steps.extend([each.step.seconds] if each.step else [])
        plans.extend([each.about] if each.stage == "memory" else [])
        show(self, bar, each)

    with patch.object(console.Show, "_show", noted):
        run([*sys.argv[1:], "--json"])
    import torch

    on_gpu, ended = torch.cuda.is_available(), time.time()
    report: dict[str, Any] = {"seconds": ended - began, "step_seconds": sorted(steps)[len(steps) // 2]}
    report |= {"first": {stage: at - began for stage, at in firsts.items()}}
    report |= {"last": {stage: at - began for stage, at in lasts.items()}}
    report |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if on_gpu else {}
    report |= {"reserved_gb": torch.cuda.max_memory_reserved() / 1e9} if on_gpu else {}
    print(json.dumps(json.loads(json.dumps(report), parse_float=lambda x: round(float(x), 3)) | {"plan": plans}))


if __name__ == "__main__":
    main()
