"""The engine's own thread. Callers reach it through a queue; what they get back comes through queues of their own.

So a caller's interrupt or exception is raised in its own thread, never within a step, and no step waits for a caller to
read. Between two steps the thread does what has come in meanwhile. (A destructor of a caller's may run in this thread,
as in any: it can delay a step, but raise nothing into it.)
"""

import atexit
import contextlib
import os
import threading
import traceback
import weakref
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from duomoe.engine.engine import Engine
from duomoe.own_threads import is_own_thread, mark_thread

R = TypeVar("R")

# What comes in: something to do between two steps; None ends the thread.
Message = Callable[[Engine], None] | None
Inbox = SimpleQueue[Message]

# Who waits looks every so many seconds whether the thread is still there.
PATIENCE = 1.0


class EngineThread:
    """Runs an engine. It ends with `close`, or when nobody holds this object any more.

    Args:
        engine: to be run; from now on nobody else may touch it while it has work.
    """

    def __init__(self, engine: Engine) -> None:
        self._inbox: Inbox = SimpleQueue()
        self._process = os.getpid()
        # Of its own, because an interrupted `Thread.join` takes a thread that runs for one that has ended.
        self._done = threading.Event()
        # The thread must not hold this object, or it would never be garbage; nor its arguments, or they would not.
        arguments = [engine], self._inbox, self._done, torch.get_num_threads()
        self._thread = threading.Thread(target=_main, args=arguments, name="duomoe-engine", daemon=True)
        self._end = weakref.finalize(self, self._inbox.put, None)
        self._end.atexit = False  # `_end_all` does more
        for done in [done for done in list(_running) if done.is_set()]:
            _running.pop(done, None)
        _running[self._done] = self._inbox
        self._thread.start()

    def send(self, message: Callable[[Engine], None]) -> None:
        """Have something done between two steps; returns at once. May be called anywhere, even by a destructor."""
        self._inbox.put(message)

    def check(self, *, waits: bool = True) -> None:
        """Raise unless the thread runs, and, for who `waits` for it, is another one.

        Raises:
            RuntimeError: when it has ended; when this process was forked from the one it runs in; when this is it.
        """
        if os.getpid() != self._process:
            raise RuntimeError("this process was forked after the model was loaded; load the model in this process")
        if self._done.is_set():
            raise RuntimeError("this model is closed")
        if waits and threading.current_thread() is self._thread:
            raise RuntimeError("what the engine itself calls cannot wait for the engine")

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
                traceback.clear_frames(error.__traceback__)  # they hold what the function had at hand
                results.put(error)

        self.send(message)
        while True:
            try:
                result = results.get(timeout=PATIENCE)
            except Empty:
                self.check()
                continue
            if isinstance(result, BaseException):
                try:
                    raise result
                finally:
                    del result  # or error and frame would hold each other
            return result[0]

    def close(self) -> None:
        """End the thread and, with errors, the requests that are under way; wait until it has let go of the engine.

        It does not wait where it is called by one of this package's threads, or in a process forked from its own.
        """
        self._end()
        if os.getpid() == self._process and not is_own_thread():
            self._done.wait()


# What is set when a thread has ended, and its inbox: of all that may still run, whether anybody holds them or not.
_running: dict[threading.Event, Inbox] = {}
os.register_at_fork(after_in_child=_running.clear)


@atexit.register
def _end_all() -> None:
    """End all threads before the interpreter does: one that computes then would take the process down with it."""
    for inbox in list(_running.values()):
        inbox.put(None)
    for done in list(_running):
        while not done.is_set():
            with contextlib.suppress(KeyboardInterrupt):
                done.wait()


def _main(engines: list[Engine], inbox: Inbox, done: threading.Event, cpu_threads: int) -> None:
    """Run the one engine in a list, which is empty then."""
    mark_thread()
    try:
        torch.set_num_threads(cpu_threads)  # whatever another engine computes on as this one begins
        _run(engines.pop(), inbox)
    finally:
        done.set()


def _run(engine: Engine, inbox: Inbox) -> None:
    """Do what comes in, and steps between; until None comes in."""
    if engine.model.device.type == "cuda":
        torch.cuda.set_device(engine.model.device)  # each thread has a current one of its own
    patience: float | None = None  # how long the next step waits for what may come in; None: until something does
    try:
        while _heed(engine, inbox, patience):
            patience = (_attempt(engine, engine.step) or 0.0) if engine.has_work else None
    finally:
        engine.close()


def _heed(engine: Engine, inbox: Inbox, patience: float | None) -> bool:
    """Do what has come in; return whether the engine is to go on.

    What comes in meanwhile waits for a step. Otherwise one who asks without end would stop all others.
    """
    for _ in range(max(1, inbox.qsize())):
        try:
            message = inbox.get(timeout=patience)
        except Empty:
            return True
        if message is None:
            return False
        _attempt(engine, partial(message, engine))
        patience = 0.0
    return True


def _attempt(engine: Engine, work: Callable[[], R]) -> R | None:
    """Do something that should not fail; if it does, all requests end with the error, and the thread goes on."""
    try:
        return work()
    except BaseException as error:
        engine.fail_all(error)
        return None
