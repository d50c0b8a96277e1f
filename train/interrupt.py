"""Ctrl-C as a request to save and stop."""

import signal
import time
from typing import Any


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request, answered between two steps; a later one kills at once."""

    # A launcher passes a Ctrl-C on to processes that the terminal has sent it already.
    ECHO_SECONDS = 2.0

    def __init__(self) -> None:
        self.requested = False
        self._first = 0.0
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        if not self.requested:
            self.requested, self._first = True, time.monotonic()
        elif time.monotonic() - self._first > self.ECHO_SECONDS:
            raise KeyboardInterrupt
