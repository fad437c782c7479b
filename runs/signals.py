"""Ctrl-C and SIGTERM: at once, or at the next training step, after the state was saved."""

import contextlib
import time

DOUBLE = 2.0  # seconds within which a further signal is the same one: torchrun and what stops it both send it


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived; `signal_number` says which. Like KeyboardInterrupt it is not an Exception, so that no
    handler mistakes it for a damaged file. `kept` is what of a run was saved, in words, or None outside training."""

    def __init__(self, signal_number, kept=None):
        super().__init__(f"Stopped {kept}." if kept else "Stopped.")
        self.signal_number, self.kept = signal_number, kept


class Stop:
    """Raises Interrupted at once, or, within `deferred()`, only notes the signal in `signal_number` for the training
    loop to act on at its next step; one that comes DOUBLE seconds later does not wait."""

    signal_number = None
    runs_removed = False  # whether --overwrite has removed earlier runs, so that resuming is to repeat without it
    _deferring = False

    def handle(self, signal_number, frame=None):
        """A handler for signal.signal."""
        now = time.monotonic()
        if not self._deferring or (self.signal_number is not None and now - self._noted > DOUBLE):
            raise Interrupted(signal_number)
        if self.signal_number is None:
            self.signal_number, self._noted = signal_number, now

    def raise_pending(self):
        """Raises Interrupted where a signal was noted."""
        if self.signal_number is not None:
            raise Interrupted(self.signal_number)

    @contextlib.contextmanager
    def deferred(self):
        """Within this context a first signal is only noted."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
