# SPDX-License-Identifier: Apache-2.0
"""What a setting loses, measured once: of its weights, and of its cache."""

import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from compress_common.errors import CompressError
from compress_common.progress import Progress
from compress_common.store import digest
from vllm_plugin.commands.judging.engine import Judged, judge
from vllm_plugin.commands.judging.figures import paired, recall
from vllm_plugin.commands.judging.material import Material, Sizes, material
from vllm_plugin.commands.judging.texts import reference
from vllm_plugin.commands.kv_evaluation import engine_arguments, setting_name
from vllm_plugin.commands.recommending.known import Known, file_digest
from vllm_plugin.settings import KEY

# Of weights: the whole window as one prompt. Of a cache: keys, and what follows a prompt.
_MEASURES = {False: ("whole",), True: ("recalled", "nats")}


@dataclass(frozen=True)
class Loss:
    """What a setting of weights or of the cache loses.

    Attributes:
        nats: per token above the uncompressed model.
        error: its standard error.
        recall: share of the keys of the full cache that is recalled; None: not measured, or there
            are none.
        recall_error: its standard error.
    """

    nats: float = 0.0
    error: float = 0.0
    recall: float | None = None
    recall_error: float | None = None

    @property
    def forgets(self) -> bool:
        """Whether it recalls less than the full cache, by more than one standard error."""
        return self.recall is not None and self.recall + (self.recall_error or 0) < 1

    def __add__(self, other: "Loss") -> "Loss":
        """Both together, as if they were independent: only one of the two has a recall."""
        known = self if self.recall is not None else other
        error = math.hypot(self.error, other.error)
        return Loss(self.nats + other.nats, error, known.recall, known.recall_error)


class Losses:
    """Measures settings of one model, or looks them up.

    Args:
        model: what it is called.
        checkpoint: of the model, already on this machine.
        known: what was measured before.
        text: a .txt or .jsonl file; None: Python's language reference.
        sizes: how much is measured.
        progress: told before each measurement.
    """

    def __init__(
        self,
        model: str,
        checkpoint: Any,
        known: Known,
        text: Path | None,
        sizes: Sizes,
        progress: Progress,
    ) -> None:
        self._model, self._checkpoint, self._known = model, checkpoint, known
        self._text, self._sizes, self._progress = text, sizes, progress
        try:
            self._text_digest = file_digest(text) if text else digest(reference())
        except OSError as error:
            raise CompressError(f"cannot read --text {text}: {error.strerror}") from error
        self.measured, self._started, self._counting = 0, set[str](), Lock()

    def check_text(self) -> None:
        """Read the text, unless it was measured on before.

        Raises:
            CompressError: the text cannot be read, or is too short.
        """
        if self._known.find(self._question(None, None)) is None:
            _ = self._material

    def start(
        self,
        settings: Iterable[tuple[str | None, Mapping[str, Any] | None]],
        pool: Executor,
        environment: Mapping[str, str],
    ) -> list["Future[Judged]"]:
        """Begin to measure what is not known and has not begun.

        Args:
            settings: weight methods and sections ``compress.kv``.
            pool: measures.
            environment: what each engine gets beside our own environment.
        """
        new: list[tuple[str | None, Mapping[str, Any] | None]] = []
        parts = [part for method, kv in settings for part in ((method, None), (None, kv))]
        for part in [(None, None), *parts]:
            question = self._question(*part)
            key = json.dumps(question, sort_keys=True)
            if key not in self._started and self._known.find(question) is None:
                self._started.add(key)
                new.append(part)
        return [pool.submit(self._judged, *part, environment) for part in new]

    def weights(self, quantization: str | None) -> Loss:
        """What a weight method loses, above 16 bits."""
        if quantization is None:
            return Loss()
        nats, error = paired(self._judged(quantization, None).whole, self._judged(None, None).whole)
        return Loss(nats, error or 0.0)

    def cache(self, kv: Mapping[str, Any] | None) -> Loss:
        """What a section ``compress.kv`` loses, above the full cache, with weights at 16 bits."""
        full = self._judged(None, None)
        ours = full if kv is None else self._judged(None, kv)
        nats, error = paired(ours.nats, full.nats)
        answers, base = (sum(each.recalled.values(), []) for each in (ours, full))
        share, share_error, _ = recall(answers, base)
        if kv is None and share is not None:
            share_error = 0.0
        return Loss(nats, error or 0.0, share, share_error)

    def _question(self, quantization: str | None, kv: Mapping[str, Any] | None) -> dict[str, Any]:
        content = dict(kv or {})
        if bases := content.get("bases"):
            content["bases"] = file_digest(Path(bases))
        return {
            "weights": quantization,
            "kv": content,
            "text": self._text_digest,
            "sizes": asdict(self._sizes),
        }

    def _judged(
        self,
        quantization: str | None,
        kv: Mapping[str, Any] | None,
        environment: Mapping[str, str] | None = None,
    ) -> Judged:
        name = quantization or (setting_name(kv) if kv else "no compression")

        def answer() -> dict[str, Any]:
            with self._counting:
                self._progress(f"measure {name}", self.measured, len(self._started))
                self.measured += 1
            folder = self._checkpoint.folder
            arguments = engine_arguments(folder, self._sizes)
            measures = _MEASURES[kv is not None]
            if quantization is not None:
                arguments |= {"quantization": quantization, "dtype": "auto"}
            elif kv is not None:
                arguments |= {"additional_config": {KEY: {"kv": dict(kv)}}}
            else:
                measures = _MEASURES[False] + _MEASURES[True]
            title = f"{self._model} ({name})"
            return asdict(
                judge(str(folder), self._material, arguments, title, measures, environment)
            )

        return Judged(**self._known.ask(self._question(quantization, kv), answer))

    @cached_property
    def _material(self) -> Material:
        return material(self._checkpoint.tokenizer, self._text, self._sizes)
