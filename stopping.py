"""Stopping a command: Ctrl-C, SIGTERM and SIGHUP set a flag, and the package's loops check it.

Python's own handler raises ``KeyboardInterrupt`` wherever the main thread is. Inside HDF5, gRPC, FAISS or
Ray that can break the process. So the command line installs handlers that raise nothing (:func:`arm`). A
thread receives the signal even while the main thread runs library code, and sets the flag. Loops call
:func:`check` between steps, which raises :class:`Stopped`. A second signal ends the process.

A program that uses histoseek as a library keeps its handling of Ctrl-C: an import installs nothing, and
:func:`check` then does nothing.
"""

from __future__ import annotations

import atexit
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
POLL_S = 0.1
"""Seconds between two checks of the flag during a wait."""
SAME_S = 0.2
"""Signals within this many seconds count as one: a terminal and ``make`` may both send the same one."""
NOTICE_S = 1.0
"""Seconds after which a command that has not stopped yet prints that it is stopping."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}


class Stopped(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP (the terminal closed) asked the command to stop.

    Attributes:
        number: the signal's number.
    """

    def __init__(self, number: int) -> None:
        """Store the signal's number."""
        super().__init__(_NAMES.get(signal.Signals(number), str(number)))
        self.number = number


class _State:
    """The flag, and the paths to remove when the process ends at once."""

    def __init__(self) -> None:
        self.armed = False
        self.number: int | None = None
        self.received = 0.0
        self.unfinished: set[Path] = set()
        self.sockets: tuple[socket.socket, socket.socket] | None = None


_state = _State()


def arm() -> None:
    """Take over the signals in this process; called once, by the command line's main thread.

    What the parent process set to be ignored (``nohup``: SIGHUP) stays ignored.
    """
    if not _state.armed:
        _take(_SIGNALS)
        atexit.register(_last)  # registered first, so called last


def _take(numbers: tuple[signal.Signals, ...]) -> None:
    """Install the handlers and the thread that listens."""
    first = _state.sockets is None
    if _state.sockets is None:
        _state.sockets = socket.socketpair()
        _state.sockets[1].setblocking(False)
        os.register_at_fork(after_in_child=_disarm)
    receiver, sender = _state.sockets
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _nothing)
    signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    _state.armed = True
    if first:  # last: if this thread exists, the handlers are installed
        threading.Thread(target=_listen, args=(receiver,), name="signals", daemon=True).start()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def rearm() -> None:
    """Install the handlers again after a library has replaced them."""
    if _state.armed:
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, _nothing):
                signal.signal(number, _nothing)


def _nothing(number: int, frame: FrameType | None) -> None:
    """Raise nothing: the listening thread sets the flag."""


def _last() -> None:
    """Ignore signals while Python shuts down, so that they cannot change the exit code."""
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _disarm() -> None:
    """Restore Python's default handling in a forked child: it receives its signals itself."""
    _state.armed, _state.number = False, None
    _state.unfinished = set()
    _state.sockets = None
    with suppress(ValueError):  # forked outside the main thread
        signal.set_wakeup_fd(-1)
        if signal.getsignal(signal.SIGINT) is _nothing:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is _nothing:
                signal.signal(number, signal.SIG_DFL)


def _listen(receiver: socket.socket) -> None:
    """Wait for signals: the first sets the flag, the second ends the process at once."""
    notice_given = False
    while True:
        waiting = _state.number is not None and not notice_given
        ready, _, _ = select.select([receiver], [], [], NOTICE_S if waiting else None)
        if not ready:
            notice_given = True
            _write("stopping after the current step; press Ctrl-C again to end at once")
            continue
        numbers = [number for number in receiver.recv(64) if number in _SIGNALS]
        if not numbers:
            continue
        now = time.monotonic()
        # when a terminal closes, the shell and the kernel may send a SIGHUP each: it never ends at once
        if _state.number is None:
            _state.received, _state.number, notice_given = now, numbers[0], False
        elif now - _state.received > SAME_S and numbers[-1] != signal.SIGHUP:
            _end_at_once(numbers[-1])


def _write(text: str) -> None:
    """Write a line to standard error from any thread, whatever the main thread is doing."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


def _end_at_once(number: int) -> NoReturn:
    """End the process at once; unfinished files are removed first."""
    _remove_unfinished()
    if os.isatty(2):
        _write("\x1b[?25h")  # a progress bar may have hidden the cursor
    _write("ended at once; repeat the command to continue from here")
    os._exit(128 + number)


def _remove_unfinished() -> None:
    for path in list(_state.unfinished):
        with suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def requested() -> bool:
    """Whether this command was asked to stop."""
    return _state.number is not None


def exit_code() -> int:
    """Return the exit code of a command that was asked to stop: 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM."""
    return 128 + (_state.number or signal.SIGINT)


def request(number: int = signal.SIGINT) -> None:
    """Ask this process to stop, as the signal ``number`` would; for processes that others control."""
    _state.number = number


def settle() -> None:
    """Clear a stop request that was fully handled, such as SIGTERM to a server."""
    _state.number = None


def check() -> None:
    """Raise if the command was asked to stop; call it where a loop can stop safely.

    Raises:
        Stopped: a signal came.
    """
    number = _state.number
    if number is not None:
        raise Stopped(number)


def result(future: Future[T]) -> T:
    """Return the result of a future; the wait ends when the command is asked to stop.

    Raises:
        Stopped: a signal came before it was done.
        Exception: whatever the future raised.
    """
    while not future.done():
        check()
        wait([future], timeout=POLL_S)
    return future.result()


def aside(call: Callable[[], T]) -> T:
    """Return the result of a long call into a library; a stop request ends the wait for it.

    The call then continues in another thread until the process ends soon after. So it may only compute
    or read: nobody would clean up files that it writes. Without :func:`arm` the call is made directly.

    Raises:
        Stopped: a signal came before it was over.
        Exception: whatever the call raised.
    """
    if not _state.armed or not _in_main_thread():
        return call()
    pool = ThreadPoolExecutor(1, thread_name_prefix="aside")
    try:
        return result(pool.submit(call))
    finally:
        pool.shutdown(wait=False)


def wait_for_signal() -> NoReturn:
    """Wait until the command is asked to stop.

    Raises:
        Stopped: a signal came.
    """
    while True:
        check()
        time.sleep(POLL_S)


def leave(code: int) -> NoReturn:
    """End the process after a stop.

    All of histoseek's files are closed by now. Threads of libraries may still run an abandoned call, and
    Python must not shut down under them, so the armed command line ends the process directly.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
    if _state.armed:
        _remove_unfinished()
        os._exit(code)
    sys.exit(code)


def mark(path: Path) -> None:
    """Register ``path``, an unfinished file or folder, for removal if the process ends at once."""
    _state.unfinished.add(path)


def unmark(path: Path) -> None:
    """Undo :func:`mark`: the path is complete, or removed."""
    _state.unfinished.discard(path)


@contextmanager
def shielded() -> Iterator[None]:
    """Delay Ctrl-C during a call into a library; it is raised after the call.

    For programs that use histoseek as a library: the armed command line raises nothing anyway.
    """
    handler = signal.getsignal(signal.SIGINT)
    if _state.armed or not _in_main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[Any, Any]] = []
    signal.signal(signal.SIGINT, lambda *args: came.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])
