# SPDX-License-Identifier: Apache-2.0
"""Gauges that Ray keeps exporting: it forgets one that is not set again within 20 seconds."""

import threading
import time
from typing import Any
from weakref import WeakSet

_PERIOD = 5.0  # seconds; a worker reports to its agent every 10
_lasting: "WeakSet[LastingGauge]" = WeakSet()
_lock = threading.Lock()
_started = False


class LastingGauge:
    """One labelled Ray gauge, set again to its last value for as long as this object lives.

    vLLM's own need none of this: they are set with every step, and vanish from an idle engine.
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
        self._value = value
        self._gauge.set(value)

    def repeat(self) -> None:
        if self._value is not None:
            self._gauge.set(self._value)


def _repeat() -> None:
    while True:
        time.sleep(_PERIOD)
        with _lock:
            gauges = list(_lasting)
        for gauge in gauges:
            gauge.repeat()
