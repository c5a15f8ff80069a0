"""Loading and saving of pipelines with an adapter, and the settings of its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from diffusers import StableDiffusionXLPipeline

from tuneavideo.bases import BASES
from tuneavideo.config import checked
from tuneavideo.errors import ModelError
from tuneavideo.method import editing
from tuneavideo.method.inflate import deflate
from tuneavideo.method.noise import NoiseSchedule, Sampler
from tuneavideo.models import loading
from tuneavideo.models.adapter import Adapter, Attached
from tuneavideo.models.loading import load_stock_pipeline
from tuneavideo.settings import Sampling
from tuneavideo.storage.run_folder import RunFolder

_Stock: Any = object  # for type checkers: the stock pipeline that it is mixed into


class AdapterMixin(_Stock):
    """Adapters of a stock pipeline: loading, saving, and the settings that they bring."""

    _attached: Attached | None = None
    _adapter: Adapter | None = None
    _run: RunFolder | None = None
    _base: str = ""
    _shipped: Any = None  # the base's scheduler, which the sampler of the settings replaces; others are kept

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, base: str | Path, *, adapter: Adapter | str | Path | None = None, **kwargs: Any
    ) -> Self:
        """Load a base, with a run's adapter if one is given.

        Args:
            base: A name of `tuneavideo models`, a hub id, a folder or a single file.
            adapter: An `Adapter`, a run folder or its `adapter` folder. None: that of the folder `base`, if
                `save_pretrained` wrote one.
            **kwargs: Arguments of `DiffusionPipeline.from_pretrained` (`dtype`, `variant`, `scheduler`, ...). A
                `scheduler` replaces the `sampler` of the settings.

        Returns:
            The pipeline, on the CPU.

        Raises:
            ModelError: The base is missing, incomplete or of another architecture.
            AdapterError: The adapter is missing, damaged, or of another base.
        """
        pipe = load_stock_pipeline(str(base), super(), **kwargs)
        if pipe.unet.config.addition_embed_type and not issubclass(cls, StableDiffusionXLPipeline):
            raise ModelError(f"{base} is a Stable Diffusion XL: open it with TuneAVideoXLPipeline")
        pipe._base, pipe._shipped = str(base), None if "scheduler" in kwargs else pipe.scheduler
        saved = loading.folder(loading.source(str(base))) / "adapter"
        if adapter is None and saved.is_dir():
            adapter = saved
        if adapter is not None:
            pipe.load_video_adapter(adapter)
        return pipe

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the base, and the adapter into its folder `adapter`; `from_pretrained` of the folder loads both.

        Args:
            save_directory: Folder to write.
            **kwargs: Arguments of `DiffusionPipeline.save_pretrained`.
        """
        adapter, run = self._adapter, self._run
        self.unload_video_adapter()
        deflate(self.unet)
        try:
            super().save_pretrained(save_directory, **kwargs)
            if adapter:
                adapter.save(Path(save_directory) / "adapter", dtype=None)
        finally:
            if adapter:
                self.load_video_adapter(adapter)
                self._run = run

    def load_video_adapter(self, adapter: Adapter | str | Path) -> None:
        """Attach an adapter in place of the present one. Calls and inversions then take the settings of its run.

        Args:
            adapter: An `Adapter`, a run folder or its `adapter` folder.

        Raises:
            AdapterError: The adapter is missing, damaged, or of another base.
        """
        self.unload_video_adapter()
        deflate(self.unet)
        run = None
        if not isinstance(adapter, Adapter):
            path = Path(adapter)
            run = next((each for each in (RunFolder(path), RunFolder(path.parent)) if each.settings.is_file()), None)
            adapter = Adapter.load(run.adapter if run else path)
        self._attached = adapter.attach(self.unet)
        self._adapter, self._run = adapter, run

    def unload_video_adapter(self) -> None:
        """Detach the adapter, which restores the weights of the UNet bit for bit."""
        if self._attached:
            self._attached.detach()
        self._attached = self._adapter = self._run = None

    def _settings(self, given: Mapping[str, Any]) -> Sampling:
        """Return the `given` settings over those of the run, or else of the base."""
        if self._run:
            own = self._run.read_settings().model_dump()
        else:
            names = (self._base, self._adapter.base if self._adapter else "")
            own = next((dict(BASES[name].settings) for name in names if name in BASES), {})
        dropped = {"seeds", "formats"} | ({"num_inv_steps"} if "num_inference_steps" in given else set())
        own = {name: value for name, value in own.items() if name in {*Sampling.model_fields} - dropped}
        if self._samples_itself(given):
            own |= {"sampler": "ddim", "timestep_spacing": None}  # its own; what it passes is checked later
        return checked(Sampling, {**own, **given})

    def _samples_itself(self, given: Mapping[str, Any]) -> bool:
        """Return whether the user has set the pipeline's scheduler, and no other sampler for this call."""
        return self.scheduler is not self._shipped and not {"sampler", "timestep_spacing"} & given.keys()

    def _sampler(self, given: Mapping[str, Any], chosen: Sampling) -> Sampler:
        if self._samples_itself(given):
            return Sampler.of(self.scheduler, chosen.num_inference_steps, chosen.strength)
        return editing.sampler_of(NoiseSchedule.of(self.scheduler), chosen)
