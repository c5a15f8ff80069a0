"""Comparison with numbers recorded from the published code ("goldens").

    compare.py  differences of tensors and their bounds
    golden.py   recorded tensors and models
    unet.py     whole UNets: predictions, inner outputs, gradients, names
    layers.py   single layers
    pipe.py     text encoder and VAE
    ddim.py     inversion and sampling
    tuning.py   a tuning with its validation
    mindone.py  MindONE's checkpoints, models, samplers and optimiser
    folder.py   choice of the check of each file, and the command

Modules import only from those above them.
"""

from benchmarks.parity.folder import check, main

__all__ = ["check", "main"]
