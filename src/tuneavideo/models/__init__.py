"""Base models: loading, encoding, decoding, adapters and add-ons."""
