"""A limit on how long one check may take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deadline(seconds: float, give_up: Callable[[], None] | None = None) -> Iterator[None]:
    """Raise TimeoutError in the block once `seconds` have passed.

    The alarm interrupts Python code and system calls, in the main thread. Native code that never
    returns hears no alarm: after twice the time `give_up` is called from a thread of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still running after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    last_resort = threading.Timer(2 * seconds, give_up or (lambda: None))
    last_resort.daemon = True
    last_resort.start()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        last_resort.cancel()
