"""Ending a run on SIGTERM and SIGINT after the step in progress, on all processes at the same step."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from detectron2.utils import comm

SIGNALS = (signal.SIGTERM, signal.SIGINT)

_ECHO = 2.0  # seconds: a scheduler and the parent process may both deliver one and the same request
_PATIENCE = 45.0  # seconds that a process of several may need for a step once it was asked to end


class Stopped(SystemExit):
    """The run ended on a signal; the exit code is 128 plus its number (SIGTERM: 143, SIGINT: 130)."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = number


class StopSignals:
    """Notes SIGTERM and SIGINT while installed, so that the trainer can end between two steps.

    A second signal, more than two seconds after the first, ends the process where it is. Where several GPU processes
    train, one that does not finish its step within 45 seconds of the signal ends as well: it waits for another one that
    has died.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._pid = os.getpid()
        self._ends_at_once = False
        self._before: dict[int, object] = {}
        self._timer: threading.Timer | None = None

    def install(self) -> None:
        """Take the signals over; does nothing outside the main thread, where Python allows no handlers."""
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._pid = os.getpid()
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self._timer is not None:
            self._timer.cancel()

    def agreed(self) -> int:
        """The number of a signal that any process has received, 0 for none; all processes have to call it."""
        if comm.get_world_size() == 1:
            return self.received
        return int(largest_of_all(float(self.received)))

    def leave_step(self) -> None:
        """The step in progress is over: what follows may take its time."""
        if self._timer is not None:
            self._timer.cancel()

    @contextmanager
    def ending_at_once(self) -> Iterator[None]:
        """A signal inside the block raises `Stopped` there: nothing that has to be saved is under way."""
        if self.received:
            raise Stopped(self.received)
        self._ends_at_once = True
        try:
            yield
        finally:
            self._ends_at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a worker that was forked from here and has not set up its own handling yet
        now = time.monotonic()
        if self.received and now - self._since > _ECHO:
            _say(f"{signal.Signals(number).name} again: ending without saving.")
            raise Stopped(number)
        if not self.received:
            self.received, self._since = number, now
            name = signal.Signals(number).name
            if self._ends_at_once:
                _say(f"{name}: ending; the checkpoint before this evaluation holds everything.")
                raise Stopped(number)
            _say(f"{name}: the run ends after this step and saves; the same signal again ends it at once.")
            if torch.cuda.is_available() and comm.get_world_size() > 1:
                self._timer = threading.Timer(_PATIENCE, _give_up, (number,))
                self._timer.daemon = True
                self._timer.start()


def largest_of_all(value: float) -> float:
    """The largest of a number over all processes, known to all of them; each has to call it."""
    if comm.get_world_size() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=comm._get_global_gloo_group())
    return tensor.item()


def _give_up(number: int) -> None:
    _say(
        f"No step ended within {_PATIENCE:.0f} s of {signal.Signals(number).name}: another process seems to have died."
    )
    os._exit(128 + number)


def _say(text: str) -> None:
    # Not through logging: a handler may run in the middle of it.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, f"{text}\n".encode())
