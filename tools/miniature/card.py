"""The model card, its numbers taken from what was measured."""

from __future__ import annotations

from pathlib import Path

from tools.miniature.artwork import PACKAGE, VERSION
from tools.miniature.world import COLOURED, COLOURS, HELD_OUT, MOTIONS, PLACES, STYLES, SUBJECTS

TEMPLATE = """# The miniature

A latent diffusion model of the Stable Diffusion architecture, small enough to ship and to tune on a laptop's CPU. It paints
64x64 pictures of a drawn world of {n_subjects} subjects, {n_places} backgrounds and {n_styles} styles, for captions of a small grammar.
`StableDiffusionPipeline.from_pretrained` opens `model/`. It is made to try and to measure video editing on, not to make pictures.

![64 pictures it painted](samples.png)

Rows of the grid: two subjects each; for each subject two captions of pairs seen in training, one with a style, and one with a
colour (for subjects that have colours) or a background never seen with this subject.

## What it understands
- Captions such as `a dog is jumping on the grass` or `a red car in the city, neon style`; parts may be left out.
- Subjects: {subjects}.
- Backgrounds: {places}.
- Styles: {styles}. Colours ({colours}) for {coloured}.
- Motions (words only; a still picture does not show them): {motions}.
- Any other word is spelled out in pieces and means nothing to it.

## How it was made
Scenes are drawn on the fly from open artwork and procedural backgrounds: the subject anywhere, also cut by the frame, 25 to 42
pixels large, turned by up to 14 degrees, mirrored. {n_held_out} pairs of subject and background are never shown in training:
{held_out}. `python -m tools.miniature` makes all of it again, from the artwork package and a seed.

| part | what |
| --- | --- |
| autoencoder | AutoencoderKL, a quarter of the side, 8 latent channels, {vae_millions:.2f} M weights |
| text encoder | CLIPTextModel, 2 layers of width 128, 16 positions, {text_millions:.2f} M weights |
| UNet | UNet2DConditionModel (32, 80, 160), self- and cross-attention at 16x16, 8x8 and 4x4, {unet_millions:.2f} M weights |
| schedule | DDIM, scaled-linear 0.00085 to 0.012, noise prediction |
| training | {training} |

## How well it does
Measured with {count} pictures of each kind and each of {seeds} seed(s), {steps} DDIM steps, guidance {guidance}; the judge reads them.

| asked for | subject | background | style | colour |
| --- | --- | --- | --- | --- |
{table}

By subject, for pairs seen in training: {by_subject}.

The autoencoder alone: {psnr:.1f} dB PSNR on held-out drawings, mean chroma error {chroma:.2f} of 255.

The judge, on held-out drawings: subject {judge_subject}, background {judge_background}, style {judge_style}, colour {judge_colour};
subject on grey or recoloured drawings {judge_recoloured}; the subject's centre is off by {judge_pixels:.2f} pixels on average.
The judge was trained apart, on drawings only; no picture of the model was shown to it and nothing of it was used to train the model.

## Files
`model/` weights in half precision (safetensors); `judge/` the judge; `clips/` {n_clips} clips of 16 frames with captions, true tracks of
the subject and edits to try, half for development and half for reports; `measured.json` the numbers above.

## Limits
It knows this world and nothing else. Fine detail (faces, wheels, windows) is soft or wrong; small subjects before busy
backgrounds, and line drawings, are hardest. It has no safety checker, because it can paint nothing that would need one.

## Licences
The artwork is [Noto Emoji](https://github.com/googlefonts/noto-emoji) (Apache-2.0), from the npm package `{package}` {version};
backgrounds are drawn by this project. Weights and clips derive from these drawings only.
"""


def write(product: Path, measured: dict) -> None:
    """Write `README.md` beside the model."""
    judge, vae = measured["judge"], measured["autoencoder"]
    kinds = measured["text to image"]
    text = TEMPLATE.format(
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
    return f"| {NAMES[kind]} | " + " | ".join(_percent(scores[n]) for n in ("subject", "background", "style", "colour")) + " |"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
