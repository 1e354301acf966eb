# SPDX-License-Identifier: Apache-2.0
"""Gauges that Ray keeps exporting. Ray forgets a gauge that is not set again within 20 seconds."""

import threading
import time
from typing import Any
from weakref import WeakSet

_PERIOD = 5.0  # seconds; a worker reports to its agent every 10
_lasting: "WeakSet[LastingGauge]" = WeakSet()
_lock = threading.Lock()
_started = False


class LastingGauge:
    """A labelled Ray gauge that is set again to its last value as long as this object lives.

    vLLM sets its own gauges with every step, so they vanish from an idle engine.
    """

    def __init__(self, gauge: Any) -> None:
        self._gauge = gauge
        self._value: float | None = None
        global _started
        with _lock:
            _lasting.add(self)
            if not _started:
                _started = True
                threading.Thread(target=_repeat, name="lasting-gauges", daemon=True).start()

    def set(self, value: float) -> None:
        """Set the gauge, now and every few seconds from now on."""
        self._value = value
        self._gauge.set(value)

    def repeat(self) -> None:
        """Set the gauge again, if it was ever set."""
        if self._value is not None:
            self._gauge.set(self._value)


def _repeat() -> None:
    while True:
        time.sleep(_PERIOD)
        with _lock:
            gauges = list(_lasting)
        for gauge in gauges:
            gauge.repeat()
