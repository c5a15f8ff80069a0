"""`python -m benchmarks.parity --goldens DIR`."""

import sys

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from benchmarks.parity import main

for library in (diffusers_logging, transformers_logging):
    library.set_verbosity_error()
    library.disable_progress_bar()
sys.exit(main())
