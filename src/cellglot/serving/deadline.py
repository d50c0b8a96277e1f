"""A limit on the time of one request, checked between its steps."""

import time


class TooSlow(RuntimeError):
    """The request was ended; the message says after how long, and how to ask for less."""


class Deadline:
    """`check()` raises TooSlow once `seconds` have passed since it was made.

    The model is given cells in blocks, with a check between them: a thread cannot be ended from outside, and those that
    go on after their users were told they ended would pile up.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        if time.monotonic() > self._end:
            raise TooSlow(f"This took over {self.seconds:.0f} seconds and was ended. Choose fewer cells.")
