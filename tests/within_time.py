"""Cases that must come to an end, whatever they are given."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

# A case that takes longer hangs: the slowest take some tens of milliseconds.
LONGEST_CASE = 30  # seconds


class Hangs(BaseException):
    """No Exception, and so nothing that the code under test may take for an error of its own."""


@contextmanager
def within_time(case: str) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hangs(case)

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_CASE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
