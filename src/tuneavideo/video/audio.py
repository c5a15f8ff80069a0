"""Decoding and encoding of sound: samples S 2, int16, 48,000 a second."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.container import InputContainer

RATE = 48_000  # samples a second
DRIFT = RATE // 100  # samples by which timestamps may differ from the number of samples


def read_sound(container: InputContainer, begin: float, seconds: float) -> np.ndarray | None:
    """Decode `seconds` of sound from `begin` on, in the file's own time; gaps are silent.

    Returns:
        Samples S 2; None if there are none.

    Raises:
        FFmpegError: The sound is damaged.
    """
    stream = container.streams.best("audio")
    if stream is None:
        return None
    if begin > 2:  # a second early, since the first samples after a seek are not exact
        container.seek(int((begin - 1) * av.time_base))
    sound = np.zeros((round(seconds * RATE), 2), np.int16)
    position, found = None, False
    for chunk, time in _samples(container, stream):
        due = round((time - begin) * RATE)
        position = due if position is None or abs(due - position) > DRIFT else position
        if position >= len(sound):
            break
        here = sound[max(position, 0) : max(position + len(chunk), 0)]
        here[:] = chunk[max(-position, 0) :][: len(here)]
        found = found or len(here) > 0
        position += len(chunk)
    return sound if found else None


def _samples(container: InputContainer, stream: Any) -> Iterator[tuple[np.ndarray, float]]:
    """Yield decoded samples S 2 and the second at which they begin."""
    resampler = av.AudioResampler(format="s16", layout="stereo", rate=RATE)
    for frame in container.decode(stream):
        for part in resampler.resample(frame):
            if part.time is not None:
                yield part.to_ndarray().reshape(-1, 2), part.time


def sound_frames(sound_SC: np.ndarray) -> Iterator[av.AudioFrame]:
    """Yield frames of 1,024 samples with timestamps from 0."""
    for begin in range(0, len(sound_SC), 1024):
        chunk = np.ascontiguousarray(sound_SC[begin : begin + 1024])
        frame = av.AudioFrame.from_ndarray(chunk.reshape(1, -1), format="s16", layout="stereo")
        frame.sample_rate, frame.pts, frame.time_base = RATE, begin, Fraction(1, RATE)
        yield frame
