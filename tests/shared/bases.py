"""Parts of the tests of bases that others use."""

from __future__ import annotations

from pathlib import Path


class Malicious:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)
