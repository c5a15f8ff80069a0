"""Faster forms of attention, convolution and normalisation, by device."""
