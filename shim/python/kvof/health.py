"""What the engines' logs say about targets: once when trouble begins, once when it is over, a reminder in between."""

import logging
import threading
import time
from collections import Counter

from .client import Batch, Status

_FINE = {Status.OK, Status.EXISTS, Status.MISS, Status.CANCELLED}
_REMIND = 60  # seconds


class Health:
    """note(batch) is for every batch that has ended; any thread may call it."""

    def __init__(self, log: logging.Logger):
        self._log = log
        self._lock = threading.Lock()
        self._trouble: Counter[int] = Counter()  # since the last message
        self._since = 0.0  # when trouble began; 0: there is none
        self._said = 0.0

    def note(self, batch: Batch) -> None:
        bad = [status for status in batch.statuses if status not in _FINE] if batch.ok < batch.count else []
        if not bad and not self._since:
            return
        now = time.monotonic()
        with self._lock:
            if bad:
                self._trouble.update(bad)
                if not self._since:
                    self._since = now
                if now - self._said >= _REMIND:
                    self._said = now
                    what = ", ".join(f"{n} {Status(status).name.lower()}" for status, n in self._trouble.items())
                    self._trouble.clear()
                    self._log.warning("kvof: %s. These are misses; the engine goes on without them", what)
            elif self._since:
                self._log.warning("kvof: works again after %.1f s", now - self._since)
                self._since = self._said = 0.0
                self._trouble.clear()
