"""Events for the browsers (server-sent events)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

HEARTBEAT = 15.0  # seconds after which a silent stream sends a comment, so that proxies keep it open
BACKLOG = 64  # events that a slow browser may be behind; older ones are dropped


class Events:
    """Streams of events; each browser that listens gets every event."""

    def __init__(self) -> None:
        self._listeners = set[asyncio.Queue[str]]()

    @property
    def has_listeners(self) -> bool:
        return bool(self._listeners)

    def publish(self, name: str, data: Mapping[str, Any]) -> None:
        """Send an event to all listeners."""
        text = encoded(name, data)
        for listener in self._listeners:
            if listener.full():
                listener.get_nowait()
            listener.put_nowait(text)

    async def stream(self, first: str = "") -> AsyncGenerator[str, None]:
        """Yield `first`, then every event from now on."""
        listener = asyncio.Queue[str](BACKLOG)
        self._listeners.add(listener)
        try:
            yield f"retry: 1000\n\n{first}"
            while True:
                try:
                    yield await asyncio.wait_for(listener.get(), HEARTBEAT)
                except TimeoutError:
                    yield ": \n\n"
        finally:
            self._listeners.discard(listener)


def encoded(name: str, data: Mapping[str, Any]) -> str:
    """Return the text of an event."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
