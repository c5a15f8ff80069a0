"""Errors that a user can correct, each with a message of one line.

```
TuneAVideoError        base class; the command line prints it and exits with 2
├── SettingsError      a setting, flag or YAML key that cannot be used
├── VideoError         a clip that cannot be read, sampled or written
├── ModelError         a base model that is missing, incomplete or of the wrong kind
├── AdapterError       an adapter that is damaged or belongs to another base
├── CheckpointError    weights of another program that are damaged, refused or not understood
├── RunError           a run folder that is missing, unfinished, in use or of another run
│   └── RunInUse       a run folder that another process works in
├── DiskError          a place that cannot be written or is full
├── MemoryShort        a clip or model too large for the memory at hand
└── MissingExtra       an optional part that is not installed
```

A message has the place, what was expected, what was found, and what to do.
"""


class TuneAVideoError(Exception):
    """An error that the user can correct.

    Attributes:
        resume_flags: Flags with which an interrupted tuning can be resumed, in spite of the error; None if it cannot,
            and a new run is needed.
    """

    def __init__(self, *message: object, resume_flags: str | None = "") -> None:
        super().__init__(*message)
        self.resume_flags = resume_flags


class SettingsError(TuneAVideoError):
    """A setting, flag or YAML key that cannot be used."""


class VideoError(TuneAVideoError):
    """A clip that cannot be read, sampled or written."""


class ModelError(TuneAVideoError):
    """A base model that is missing, incomplete or of the wrong kind."""


class AdapterError(TuneAVideoError):
    """An adapter that is damaged or belongs to another base."""


class CheckpointError(TuneAVideoError):
    """Weights of another program that are damaged, refused or not understood."""


class RunError(TuneAVideoError):
    """A run folder that is missing, unfinished, in use or of another run."""


class RunInUse(RunError):
    """A run folder that another process works in."""


class DiskError(TuneAVideoError):
    """A place that cannot be written or is full."""


class MemoryShort(TuneAVideoError):
    """A clip or model too large for the memory at hand."""


class MissingExtra(TuneAVideoError):
    """An optional part that is not installed."""

    def __init__(self, what: str, extra: str, packages: str = "") -> None:
        super().__init__(f"{what} needs an optional part: pip install '{packages or f'tuneavideo[{extra}]'}'")


def error_line(error: Exception) -> str:
    """Return the line that a user gets for an error; one that is no TuneAVideoError is a fault of the program."""
    parts = [str(error)] if isinstance(error, TuneAVideoError) else [
        f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}",
        "--debug shows where; please report it with what 'tuneavideo doctor' prints",
    ]  # fmt: skip
    return "; ".join([*parts, *getattr(error, "__notes__", ())])
