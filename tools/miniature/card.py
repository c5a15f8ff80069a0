"""The model card, its numbers taken from what was measured."""

from __future__ import annotations

from pathlib import Path

from tools.miniature.artwork import PACKAGE, VERSION
from tools.miniature.world import COLOURED, COLOURS, HELD_OUT, MOTIONS, PLACES, STYLES, SUBJECTS

TEMPLATE = Path(__file__).with_name("card.md")


def write(product: Path, measured: dict) -> None:
    """Write `README.md` beside the model."""
    judge, vae = measured["judge"], measured["autoencoder"]
    kinds = measured["text to image"]
    text = TEMPLATE.read_text().format(
        n_subjects=len(SUBJECTS), n_places=len(PLACES), n_styles=len(STYLES), n_held_out=len(HELD_OUT), n_clips=24,
        subjects=", ".join(SUBJECTS), places=", ".join(PLACES.values()), styles=", ".join(STYLES),
        colours=", ".join(COLOURS), coloured=", ".join(COLOURED), motions=", ".join(MOTIONS),
        held_out=", ".join(f"{subject} {PLACES[place]}" for subject, place in sorted(HELD_OUT)),
        vae_millions=measured["millions"]["vae"], text_millions=measured["millions"]["text_encoder"],
        unet_millions=measured["millions"]["unet"], training=measured["training"], count=measured["count"],
        seeds=measured["seeds"], steps=measured["steps"], guidance=measured["guidance"],
        table="\n".join(_row(kind, scores) for kind, scores in kinds.items()),
        by_subject=", ".join(f"{name} {_percent(share)}" for name, share in kinds["seen"]["by subject"].items()),
        psnr=vae["psnr"], chroma=vae["chroma error"], judge_subject=_percent(judge["subject"]),
        judge_background=_percent(judge["background"]), judge_style=_percent(judge["style"]),
        judge_colour=_percent(judge["colour"]), judge_recoloured=_percent(judge["subject, recoloured"]),
        judge_pixels=judge["pixels"], package=PACKAGE, version=VERSION,
    )  # fmt: skip
    (product / "README.md").write_text(text)


NAMES = {
    "seen": "subject and background seen together", "held out": "never seen together", "style": "with a style",
    "colour": "with a colour",
}  # fmt: skip


def _row(kind: str, scores: dict) -> str:
    return (
        f"| {NAMES[kind]} | "
        + " | ".join(_percent(scores[n]) for n in ("subject", "background", "style", "colour"))
        + " |"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
