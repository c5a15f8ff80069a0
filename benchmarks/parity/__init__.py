"""Does tuneavideo compute what the published code computed? Compares with numbers recorded from it ("goldens").

    compare.py  how far a tensor is from the recorded one, and how far it may be
    golden.py   what was recorded: tensors, models, noise levels
    unet.py     whole UNets: predictions, outputs inside, gradients, names
    layers.py   single layers
    pipe.py     text encoder and VAE
    ddim.py     inversion and sampling
    tuning.py   a tuning with its validation
    mindone.py  MindONE's checkpoints, models, samplers and optimiser
    folder.py   which file is checked how, and what is told

Imports go up this list only.
"""

from benchmarks.parity.folder import check, main

__all__ = ["check", "main"]
