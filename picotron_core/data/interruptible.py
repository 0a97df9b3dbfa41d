"""Long calls into native code, during which signals are still handled at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

LEAVE_S = 0.5  # how long a call that was interrupted is waited for


class Interrupted(Exception):  # noqa: N818 - no error: it ends a call whose caller has left
    """Raised in a call whose caller has stopped waiting for it."""


def interruptible(call: Callable[[], T], left: threading.Event | None = None) -> T:
    """Call a function in another thread, and return what it returns.

    Python runs the handlers of signals in the main thread, and only between its own instructions:
    in a native call of seconds Ctrl-C would wait for its end. A thread that has to be left behind
    does not keep the process from ending.

    Args:
        left: is set when a signal ended the waiting; where `call` gets back into Python it should
            then raise `Interrupted`.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    ended = threading.Event()
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is raised by future.result()
            future.set_exception(error)
        finally:
            ended.set()

    threading.Thread(target=run, name="native call", daemon=True).start()
    try:
        ended.wait()
    except BaseException:
        if left is not None:
            left.set()
        ended.wait(LEAVE_S)
        raise
    return future.result()
