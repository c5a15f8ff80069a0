"""Diffusers pipelines for Python users: stock Stable Diffusion pipelines whose UNet sees clips."""

from tuneavideo.pipeline.video import InvertedClip as InvertedClip
from tuneavideo.pipeline.video import TuneAVideoPipeline as TuneAVideoPipeline
from tuneavideo.pipeline.video import TuneAVideoPipelineOutput as TuneAVideoPipelineOutput
from tuneavideo.pipeline.video import TuneAVideoXLPipeline as TuneAVideoXLPipeline
