"""The engine's own thread. Callers reach it through a queue; what they get back comes through queues of their own.

So nothing that happens to a caller happens within a step: no interrupt, no exception, no garbage collection of what it
held, and no wait for it to read. Between two steps the thread does what has come in meanwhile.
"""

import atexit
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from duomoe.engine.engine import Engine

R = TypeVar("R")

# What comes in: something to do between two steps; None ends the thread.
Message = Callable[[Engine], None] | None

# Who waits looks every so many seconds whether the thread is still there.
PATIENCE = 1.0


class EngineThread:
    """Runs an engine. It ends with `close`, or when nobody holds this object any more.

    Args:
        engine: to be run; from now on nobody else may touch it.
    """

    def __init__(self, engine: Engine) -> None:
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._process = os.getpid()
        # The thread must not hold this object, or it would never be garbage.
        self._thread = threading.Thread(target=_run, args=(engine, self._inbox), name="duomoe-engine", daemon=True)
        self._end = weakref.finalize(self, self._inbox.put, None)
        self._end.atexit = False  # `_end_all` does more
        for thread in [thread for thread in _threads if not thread.is_alive()]:
            _threads.pop(thread, None)
        self._thread.start()
        _threads[self._thread] = self._inbox

    def send(self, message: Callable[[Engine], None]) -> None:
        """Have something done between two steps; returns at once. May be called anywhere, even by a destructor."""
        self._inbox.put(message)

    def check(self) -> None:
        """Raise unless the thread runs.

        Raises:
            RuntimeError: when it has ended, or this process was forked from the one it runs in.
        """
        if os.getpid() != self._process:
            raise RuntimeError("this process was forked after the model was loaded; load the model in this process")
        if not self._thread.is_alive():
            raise RuntimeError("this model is closed")

    def call(self, function: Callable[[Engine], R]) -> R:
        """Have a function called between two steps; wait for it and return its result, or raise its error.

        Raises:
            RuntimeError: as `check`.
        """
        self.check()
        results: SimpleQueue[tuple[R] | BaseException] = SimpleQueue()

        def message(engine: Engine) -> None:
            try:
                results.put((function(engine),))
            except BaseException as error:  # whatever it is, the one who waits must hear of it
                results.put(error)

        self.send(message)
        while True:
            try:
                result = results.get(timeout=PATIENCE)
            except Empty:
                self.check()
                continue
            if isinstance(result, BaseException):
                raise result
            return result[0]

    def close(self) -> None:
        """End the thread, and with errors the requests that are under way. Does nothing where it has ended."""
        self._end()
        if os.getpid() == self._process and threading.current_thread() is not self._thread:
            self._thread.join()


# All that may still run, whether anybody holds them or not. One that was told to end has yet to let go of its engine.
_threads: dict[threading.Thread, "SimpleQueue[Message]"] = {}


@atexit.register
def _end_all() -> None:
    """End all threads before the interpreter does: one that computes then would take the process down with it."""
    for thread, inbox in list(_threads.items()):
        inbox.put(None)
        thread.join()


def _run(engine: Engine, inbox: "SimpleQueue[Message]") -> None:
    """Do what comes in, and steps between; until None comes in."""
    if engine.model.device.type == "cuda":
        torch.cuda.set_device(engine.model.device)  # each thread has a current one of its own
    while True:
        try:
            message = inbox.get(block=not engine.has_work)
        except Empty:
            _attempt(engine, engine.step)
            continue
        if message is None:
            break
        _attempt(engine, partial(message, engine))
    engine.close()


def _attempt(engine: Engine, work: Callable[[], None]) -> None:
    """Do something that should not fail; if it does, all requests end with the error, and the thread goes on."""
    try:
        work()
    except BaseException as error:
        engine.fail([*engine.scheduler.running, *engine.scheduler.waiting], error)
