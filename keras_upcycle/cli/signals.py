"""A request to end, as an exception: what is open is cleaned up on the way."""

import contextlib
import signal
import threading
from collections.abc import Iterator

# A terminal that is closed sends SIGHUP; Windows has none.
_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGHUP")
    if hasattr(signal, name)
]


class Stopped(KeyboardInterrupt):
    """A signal to end; handled as Ctrl-C is.

    Args:
        number: The signal's.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def as_exceptions() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise `Stopped`.

    A handler that somebody else set, or the `SIG_IGN` of `nohup`, stays. Only
    the main thread may set handlers: in another one nothing is done.
    """
    mine = []
    if threading.current_thread() is threading.main_thread():
        mine = [s for s in _SIGNALS if signal.getsignal(s) is signal.SIG_DFL]
    for number in mine:
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def exit_code(stop: KeyboardInterrupt) -> int:
    """As shells count: 128 and the signal's number."""
    return 128 + getattr(stop, "number", signal.SIGINT)


def _raise(number, frame):
    del frame
    raise Stopped(number)
