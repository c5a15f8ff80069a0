"""Parts of the tests of adapter that others use."""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from tests.shared.inflation import randomised
from tuneavideo.method.inflate import added_parameters, inflate, trainable_parameters
from tuneavideo.models.adapter import Adapter, fingerprint
from tuneavideo.settings import Inflation

LAYERS = ("attn1.to_q", "attn2.to_q", "attn_temp")


def learned(unet: UNet2DConditionModel, inflation: Inflation | None = None) -> Adapter:
    """An adapter of a UNet whose tuned and added layers have all moved; the UNet stays inflated."""
    marks = fingerprint(unet)
    inflate(unet, inflation)
    randomised(unet)
    tuned = trainable_parameters(unet, LAYERS)
    for name, parameter in tuned.items():
        if name not in added_parameters(unet):
            parameter.data += 0.1
    return Adapter.of(
        unet, tuned, inflation=inflation or Inflation(), base="tiny", fingerprint=marks, about={"prompt": "a square"}
    )
