"""Which threads an engine's end depends on: what a destructor calls in one of them must not wait for that end."""

import threading

_own = threading.local()


def mark_thread() -> None:
    """Note that the calling thread is one of them."""
    _own.marked = True


def is_own_thread() -> bool:
    """Return whether the calling thread is one of them."""
    return getattr(_own, "marked", False)
