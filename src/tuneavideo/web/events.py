"""Events for the browsers (server-sent events)."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from typing import Any

HEARTBEAT = 15.0  # seconds after which silent streams send a comment, so that proxies keep them open
BACKLOG = 64  # parts that a slow browser may be behind; older ones are dropped
# Seconds of which events are sent together; more with many listeners, since each costs time.
PERIOD, PER_LISTENER, MOST = 0.2, 0.0015, 0.5


class Events:
    """Streams of events; each browser that listens gets every event.

    Events are encoded once, and those of a short time are sent as one part, for which all streams wait together.
    """

    def __init__(self) -> None:
        self._parts = deque[bytes](maxlen=BACKLOG)
        self._count, self._listeners = 0, 0
        self._pending = list[str]()
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        self._changed.set()

    @property
    def has_listeners(self) -> bool:
        return self._listeners > 0

    def publish(self, name: str, data: Mapping[str, Any]) -> None:
        """Send an event to all listeners."""
        if self._listeners:
            self._pending.append(encoded(name, data))
            if len(self._pending) == 1:
                self._send_in(min(MOST, max(PERIOD, PER_LISTENER * self._listeners)))

    def _send_in(self, seconds: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._send)

    def _send(self) -> None:
        """Let all streams send what is pending, or a comment."""
        self._parts.append(("".join(self._pending) or ": \n\n").encode())
        self._pending.clear()
        self._count += 1
        self._changed.set()
        self._changed = asyncio.Event()
        self._timer = None
        if self._listeners:
            self._send_in(HEARTBEAT)

    async def stream(self, first: str = "") -> AsyncGenerator[bytes, None]:
        """Yield `first`, then every event from now on."""
        seen, self._listeners = self._count, self._listeners + 1
        if not self._timer:
            self._send_in(HEARTBEAT)
        try:
            yield f"retry: 1000\n\n{first}".encode()
            while not self._closed:
                if seen == self._count:
                    await self._changed.wait()
                    continue
                new = min(self._count - seen, len(self._parts))
                seen = self._count
                yield b"".join([*self._parts][-new:])
        finally:
            self._listeners -= 1


def encoded(name: str, data: Mapping[str, Any]) -> str:
    """Return the text of an event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
