"""Jobs, one module per step: prepare, tune, invert, edit, export."""
