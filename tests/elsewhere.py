"""A device that is none: its tensors say that they lie elsewhere, and the CPU computes them.

What would not meet on a GPU does not meet here: an operation on tensors of both places is an error, and so is drawing
numbers there from a generator of the CPU. What waits for the device, or copies between the two, is counted. A process
that imports this module has an accelerator in torch's eyes, and keeps it: tests run it in one of its own.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "elsewhere"
os.environ["ACCELERATE_TORCH_DEVICE"] = NAME
WAITS = "aten._local_scalar_dense.default"
COPIES = ("aten._to_copy.default", "aten.copy_.default")
INDEXES = ("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index")  # which may be the CPU's
# What autocast computes in half precision, and what in full, as far as a UNet has it.
HALF = ("linear", "conv2d", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
FULL = ("layer_norm", "group_norm", "mse_loss", "softmax")


class Module(backend_registration._DummyBackendModule):
    """What torch asks a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, *_: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *_: Any) -> None:
        pass

    set_device = synchronize = empty_cache = set_rng_state


backend_registration._setup_privateuseone_for_python_backend(NAME, Module())
HERE, ELSEWHERE = torch.device("cpu"), torch.device(NAME, 0)


class There(torch.Tensor):
    """A tensor elsewhere, and the one of the CPU that has its numbers."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        made: There = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            layout=here.layout, device=ELSEWHERE,
        )  # fmt: skip
        made.here = here
        return made

    @property
    def data(self) -> Any:
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, value: There) -> None:
        torch.Tensor.data.__set__(self, value)
        self.here = value.here

    def __deepcopy__(self, _: Any) -> Any:
        return There(self.here.clone()).requires_grad_(self.requires_grad)

    def __repr__(self, **_: Any) -> str:
        return f"There({self.here})"

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("what lies elsewhere has to be copied here first")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Makes tensors elsewhere where that is asked for; nothing else would see `torch.zeros(3, device=...)`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


counts: Counter[tuple[str, str]] = Counter()
"""How often there were `waits` for the device and `copies` to or from it, by the place in our code that asked."""


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives, on the CPU's tensors."""
    name, tensors = str(func), [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    asked, goes = kwargs.get("device"), bool(there)
    if name == "aten._fused_sdp_choice.default":
        return 0  # the plain form, which consists of operations seen here
    if name == "aten.copy_.default":
        goes = isinstance(args[0], There)
    if asked is not None:
        goes, kwargs = torch.device(asked).type == NAME, kwargs | {"device": HERE}
    _check(name, tensors, there, goes, kwargs)
    if name == WAITS and there:
        counts["waits", _place()] += 1
    if name in COPIES and len({*(isinstance(x, There) for x in tensors), goes}) > 1:
        counts["copies", _place()] += 1
    args, kwargs = tree_map_only(There, lambda x: x.here, (args, kwargs))
    known = {id(x.here): x for x in there}
    made = func(*args, **kwargs)
    return tree_map_only(torch.Tensor, lambda x: known[id(x)] if id(x) in known else There(x) if goes else x, made)


def _check(name: str, tensors: Sequence[torch.Tensor], there: Sequence[There], goes: bool, kwargs: Any) -> None:
    meets = name in COPIES or name.startswith(INDEXES)
    away = any(not isinstance(x, There) and x.ndim for x in tensors)
    if there and away and (not meets or (not isinstance(tensors[0], There) and name not in COPIES)):
        raise RuntimeError(f"{name}: tensors of two devices, of shapes {[tuple(x.shape) for x in tensors]}")
    if goes and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: a generator of the CPU is asked for numbers elsewhere")


def _place() -> str:
    frame = sys._getframe()
    while frame and "/src/tuneavideo/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}: {frame.f_code.co_name}" if frame else ""


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """Within it there is the device."""
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) is made here and copied, visibly
    try:
        with Mode():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)


def _autocast() -> list[torch.library.Library]:
    """Have autocast cast there as on a GPU."""
    every, some = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def casting(name: str, half: bool) -> None:
        operation = getattr(torch.ops.aten, name)

        def cast(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(NAME) if half else torch.float32
            with torch._C._ExcludeDispatchKeyGuard(key):
                args, kwargs = tree_map_only(
                    torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, (args, kwargs)
                )
                return operation(*args, **kwargs)

        some.impl(name, cast, "AutocastPrivateUse1")

    for names, half in ((HALF, True), (FULL, False)):
        for name in names:
            casting(name, half)
    return [every, some]


LIBRARIES = _autocast()  # registered as long as they are held
