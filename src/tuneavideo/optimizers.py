"""Optimisers by name."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch

from tuneavideo.errors import MissingExtra, SettingsError
from tuneavideo.settings import TuneSettings

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "transformers.optimization.Adafactor",
}


def optimizer(settings: TuneSettings, parameters: list[Any]) -> torch.optim.Optimizer:
    """The optimiser that the settings name, given those of them that it takes.

    Raises:
        SettingsError: There is no such class, or it is no optimiser.
        MissingExtra: It needs a package that is not here.
    """
    path = OPTIMIZERS.get(settings.optimizer, settings.optimizer)
    package, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError, ValueError) as error:
        if settings.optimizer == "adamw8bit":
            raise MissingExtra("The 8-bit optimizer", "8bit") from None
        known = ", ".join(OPTIMIZERS)
        raise SettingsError(
            f"optimizer {settings.optimizer!r}: {error}; known are {known} and any package.Class"
        ) from None
    wished = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
        "relative_step": False,
        "fused": True,
    }
    taken = inspect.signature(kind).parameters
    if isinstance(taken.get("eps") and taken["eps"].default, tuple):
        del wished["eps"]  # Adafactor's eps is a pair of another meaning
    if not issubclass(kind, torch.optim.Optimizer):
        raise SettingsError(f"optimizer {settings.optimizer!r} is no torch.optim.Optimizer; name a class that is one")
    return kind(parameters, **{name: value for name, value in wished.items() if name in taken})
