"""Optimizers by name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path
from typing import Any

import torch

from tuneavideo.errors import MissingExtra, SettingsError
from tuneavideo.settings import TuneSettings

OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "adafactor": "transformers.optimization.Adafactor",
}
# New paths of classes that settings of older runs name.
MOVED = {"tuneavideo.checkpoints.optimizer.UncorrectedAdamW": "tuneavideo.interop.optimizer.UncorrectedAdamW"}
# pip requirements of packages that have optimizers.
PACKAGES = {
    "bitsandbytes": "bitsandbytes>=0.45",
    "dadaptation": "dadaptation",
    "lion_pytorch": "lion-pytorch",
    "prodigyopt": "prodigyopt",
    "pytorch_optimizer": "pytorch-optimizer",
    "schedulefree": "schedulefree",
}
OWN = ("torch", "tuneavideo")


def make_optimizer(settings: TuneSettings, parameters: list[Any]) -> torch.optim.Optimizer:
    """Make the optimizer that the settings name, with those settings that its class takes.

    Raises:
        SettingsError: The class is not found, or is no optimizer for these parameters.
        MissingExtra: It needs a package that is not installed.
    """
    kind = optimizer_class(settings.optimizer)
    options = {
        "lr": settings.learning_rate,
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
        "relative_step": False,
        "scale_parameter": False,  # Adafactor: steps of the learning rate, as Adam's, not a fraction of the weights
        "fused": True,
    }
    taken = inspect.signature(kind).parameters
    if isinstance(taken.get("eps") and taken["eps"].default, tuple):
        del options["eps"]  # Adafactor's eps is a pair of another meaning
    try:
        return kind(parameters, **{name: value for name, value in options.items() if name in taken})
    except (TypeError, ValueError, RuntimeError) as error:
        raise SettingsError(
            f"optimizer {settings.optimizer!r} cannot be used: {' '.join(str(error).split())}; take {_known()}"
        ) from None


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the optimizer class of a short name, or of `package.Class` in an installed package.

    Raises:
        SettingsError: There is no such class, or its step needs a closure.
        MissingExtra: It needs a package that is not installed.
    """
    path = OPTIMIZERS.get(name) or MOVED.get(name) or _in_torch(name) or name
    module, _, word = path.rpartition(".")
    _refuse_other_packages(name, module.partition(".")[0])
    try:
        kind = getattr(importlib.import_module(module), word)
    except Exception as error:  # the package's code may raise anything
        raise SettingsError(f"optimizer {name!r}: {' '.join(str(error).split())}; take {_known()}") from None
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise SettingsError(f"optimizer {name!r} is no torch.optim.Optimizer; take {_known()}")
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure and closure.default is closure.empty:
        raise SettingsError(f"optimizer {name!r} computes the loss several times a step; take {_known()}")
    return kind


def _known() -> str:
    return f"{', '.join(OPTIMIZERS)}, one of torch.optim (such as sgd), or package.Class of an installed package"


def _in_torch(name: str) -> str | None:
    """Return the path of a class of torch.optim by its name, in any case."""
    known = {each.lower(): each for each in vars(torch.optim) if isinstance(getattr(torch.optim, each), type)}
    return f"torch.optim.{known[name.lower()]}" if name.lower() in known else None


def _refuse_other_packages(name: str, package: str) -> None:
    """Raise SettingsError for a package of no installed distribution, such as one in the current folder."""
    if package in OWN:
        return
    if package in PACKAGES and importlib.util.find_spec(package) is None:
        what = "The 8-bit optimizer" if name == "adamw8bit" else f"Optimizer {name!r}"
        raise MissingExtra(what, "8bit", PACKAGES[package])
    if not package or not _is_installed(package):
        found = f"{package!r} is no installed package" if package else "no such name"
        raise SettingsError(f"optimizer {name!r}: {found}; take {_known()}")


def _is_installed(package: str) -> bool:
    """Return whether Python would import this package from an installed distribution."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        return False
    for each in packages_distributions().get(package, ()):
        try:
            if Path(spec.origin).is_relative_to(Path(str(distribution(each).locate_file("")))):
                return True
        except PackageNotFoundError:
            continue
    return False
