# SPDX-License-Identifier: Apache-2.0
"""A report of what happened since the last one, from workers and scheduler to the front end."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

# vLLM serializes plain dicts and lists: counters {name: {label: sum}}, gauges {name: value},
# seconds [...]. A counter without labels has the label "".
Data = dict[str, Any]


def _nothing() -> Data:
    return {"counters": {}, "gauges": {}, "seconds": []}


class CompressStats(KVConnectorStats):
    """Counts and durations since the last report, and the latest gauges."""

    def __init__(self, data: Data | None = None) -> None:
        super().__init__(data or _nothing())

    def add(self, name: str, amount: float, label: str = "") -> None:
        """Add to a counter. An amount of 0 is not sent."""
        if amount:
            counter = self.data["counters"].setdefault(name, {})
            counter[label] = counter.get(label, 0) + amount

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self.data["gauges"][name] = value

    def took(self, seconds: float) -> None:
        """Record how long the compactions of one step took, in seconds."""
        self.data["seconds"].append(seconds)

    def reset(self) -> None:
        self.data = _nothing()

    def is_empty(self) -> bool:
        return not any(self.data.values())

    def aggregate(self, other: KVConnectorStats) -> "CompressStats":
        """Add another report, whose gauges are newer."""
        for name, labels in other.data["counters"].items():
            for label, amount in labels.items():
                self.add(name, amount, label)
        self.data["gauges"] |= other.data["gauges"]
        self.data["seconds"] += other.data["seconds"]
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return the figures of vLLM's log line for an interval."""
        counters = self.data["counters"]
        line: dict[str, int | float] = {
            name: round(sum(labels.values()), 1) for name, labels in sorted(counters.items())
        }
        return line | {name: round(value, 3) for name, value in self.data["gauges"].items()}
