"""What was tried on the miniature benchmark: variants by name, and the ledger of their rows.

    python -m benchmarks.experiments untuned default official --seeds 3

The ledger, benchmarks/results/miniature.jsonl, has a line for every clip, variant and seed; what it has is not run
again, so this can be stopped at any time.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tuneavideo.evaluation.compare import estimate
from tuneavideo.evaluation.miniature import CONTROL, Variant, benchmark, edits_of

LEDGER = Path(__file__).parent / "results" / "miniature.jsonl"
BRIEF = {"num_inference_steps": 25, "num_inv_steps": 25}
OFFICIAL = {"preset": "official"}
SWEEP = {
    f"official, rate {rate:g}, {steps} steps": OFFICIAL | BRIEF | {"learning_rate": rate, "max_train_steps": steps}
    for rate in (3e-4, 1e-3, 3e-3)
    for steps in (75, 150)
}
"""The published arithmetic at its best on this model: rates and numbers of steps to choose from."""
ANCHOR = OFFICIAL | BRIEF | {"learning_rate": 1e-3, "max_train_steps": 75}
"""What single ideas are added to."""
IDEAS: dict[str, dict[str, Any]] = {
    "down blocks learn": {"frozen_modules": ()},
    "temporal attention starts at zero": {"temporal_init": "zero"},
    "norms per frame": {"clip_norm": False},
    "references first + own": {"references": ("first", "own")},
    "stratified noise levels": {"timestep_sampling": "stratified"},
    "min-SNR 5": {"snr_gamma": 5.0},
    "debiased loss": {"debias_weight": 1.0},
    "noise shared by frames, 0.2": {"noise_shared": 0.2},
    "LoRA, rank 8": {"lora_rank": 8},
    "average of weights": {"use_ema": True, "ema_decay": 0.95},
    "attention injected, 0.4": {"attention_injection": 0.4},
    "attention injected, 0.6": {"attention_injection": 0.6},
    "attention injected, 0.8": {"attention_injection": 0.8},
    "guidance 5": {"guidance_scale": 5.0},
    "guidance in the first 0.6": {"guidance_interval": (0.0, 0.6)},
    "fresh noise 0.2": {"fresh_noise": 0.2},
    "strength 0.8": {"strength": 0.8},
}
VARIANTS = {
    variant.name: variant
    for variant in (
        CONTROL,
        Variant("default"),
        Variant("official", OFFICIAL),
        Variant("anchor", ANCHOR),
        *(Variant(name, settings) for name, settings in SWEEP.items()),
        *(Variant(name, ANCHOR | change) for name, change in IDEAS.items()),
    )
}
SCORES = ("clean", "success", "preserved", "track", "consistency", "background_db")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--part", default="development", choices=("development", "report"))
    parser.add_argument("--clips", type=int)
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args()
    rows = []
    for row in benchmark(
        [VARIANTS[name] for name in chosen.variants], LEDGER, seeds=range(chosen.seeds), part=chosen.part,
        clips=chosen.clips, processes=chosen.processes,
    ):  # fmt: skip
        rows.append(row)
        print(row["variant"], row["clip"], row["seed"], [edit["clean"] for edit in row["edits"]], flush=True)
    for name in chosen.variants:
        edits = edits_of([row for row in rows if row["variant"] == name])
        print(f"\n{name} ({len(edits)} edits)")
        for kind in ("all", "subject", "background", "style", "two"):
            of_kind = [edit for edit in edits if kind in ("all", edit["kind"])]
            said = [(score, estimate(of_kind, score)) for score in SCORES if any(e[score] is not None for e in of_kind)]
            print(f"  {kind:10} " + "  ".join(f"{score} {e.mean:.3f} [{e.low:.2f} {e.high:.2f}]" for score, e in said))


if __name__ == "__main__":
    main()
