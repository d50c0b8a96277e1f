"""The limit on the time of a request."""

import pytest

from cellglot.serving import Deadline, TooSlow


def test_a_request_ends_once_its_time_is_over() -> None:
    Deadline(60).check()
    with pytest.raises(TooSlow, match="Choose fewer cells"):
        Deadline(-1).check()
