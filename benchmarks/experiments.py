"""What was tried on the miniature benchmark: variants by name, and the ledger of their rows.

    python -m benchmarks.experiments untuned default official --seeds 3

The ledger, benchmarks/results/miniature.jsonl, has a line for every clip, variant and seed; what it has is not run
again, so this can be stopped at any time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.ideas import ANCHOR, IDEAS, OFFICIAL, SWEEP
from tuneavideo.evaluation.compare import estimate
from tuneavideo.evaluation.miniature import CONTROL, Variant, benchmark, edits_of

LEDGER = Path(__file__).parent / "results" / "miniature.jsonl"
VARIANTS = {
    variant.name: variant
    for variant in (
        CONTROL,
        Variant("default"),
        Variant("official", OFFICIAL),
        Variant("anchor", ANCHOR),
        *(Variant(name, settings) for name, settings in SWEEP.items()),
        *(Variant(name, ANCHOR | idea.change) for name, idea in IDEAS.items()),
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
