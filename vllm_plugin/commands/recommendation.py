# SPDX-License-Identifier: Apache-2.0
"""Measures a few settings of a model, and chooses one for a device and a load."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compress_common.checkpoints.checkpoint import Checkpoint, resolve
from compress_common.checkpoints.local import text_config
from compress_common.errors import CompressError
from compress_common.progress import Progress, silent
from vllm_plugin import KEY
from vllm_plugin.capacity.blocks import RequestBlocks
from vllm_plugin.commands.common import Problems, gib
from vllm_plugin.commands.judging.engine import Judged
from vllm_plugin.commands.judging.material import Sizes
from vllm_plugin.commands.recommending.candidates import CSKV, Setting, settings
from vllm_plugin.commands.recommending.frontier import Candidate, choose, frontier
from vllm_plugin.commands.recommending.known import Known
from vllm_plugin.commands.recommending.losses import Loss, Losses
from vllm_plugin.commands.recommending.memory import Size, size_of
from vllm_plugin.commands.recommending.side_by_side import side_by_side
from vllm_plugin.compatibility import model_length

SIZES = Sizes(context=512, windows=12, keys=4)

Section = dict[str, Any] | None  # compress.kv


@dataclass(frozen=True)
class Wanted:
    """The device and the load.

    Attributes:
        memory: bytes of the device.
        utilization: share of it that vLLM may use.
        context: tokens of a request when it ends.
        prompt: how many of them are prompt.
        concurrency: requests at once, one of them in prefill.
    """

    memory: int
    utilization: float
    context: int
    prompt: int
    concurrency: int

    @property
    def load(self) -> str:
        """What is served at once."""
        plural = "" if self.concurrency == 1 else "s"
        return f"{self.concurrency} request{plural} of {self.context:,} tokens"


@dataclass(frozen=True)
class Row:
    """A setting that can be served, what it takes, and what it loses."""

    setting: Setting
    size: Size
    weights: Loss
    cache: Loss

    @property
    def loss(self) -> Loss:
        """Of both together."""
        return self.weights + self.cache

    def candidate(self, concurrency: int) -> Candidate:
        """Return it as one to choose from."""
        needs = self.size.needs(concurrency)
        return Candidate(
            self.setting.name, needs, self.loss.nats, self.loss.error, self.cache.forgets
        )


@dataclass(frozen=True)
class Recommendation:
    """All settings, and those to take.

    Attributes:
        rows: what can be served, in the order of ``settings``.
        chain: the frontier, the smallest first.
        chosen: index in it.
        left_out: by setting, why it cannot be served.
        measured: how many engines ran; 0: all was known.
        folder: where what was measured is kept.
    """

    rows: list[Row]
    chain: list[Candidate]
    chosen: int
    left_out: dict[str, str] = field(default_factory=dict)
    measured: int = 0
    folder: Path = Path()

    def row(self, candidate: Candidate) -> Row:
        """Return the row of a candidate."""
        return next(row for row in self.rows if row.setting.name == candidate.name)


def recommend(
    model: str,
    wanted: Wanted,
    text: Path | None = None,
    *,
    progress: Progress = silent,
) -> Recommendation:
    """Choose a setting.

    Args:
        model: a folder or hub id.
        wanted: the device and the load.
        text: a .txt or .jsonl file; None: Python's language reference.
        progress: told before each step that takes long.

    Raises:
        CompressError: lists what is wrong with the arguments, or says that nothing fits.
    """
    problems, checkpoint = Problems(), Checkpoint(resolve(model))
    if checkpoint.config.get("quantization_config"):
        problems.found.append(f"{model} is quantized already; give the 16-bit checkpoint")
    known = Known(checkpoint)
    positions = problems.collect(lambda: _positions(known, checkpoint))
    if positions is not None and wanted.context > positions:
        problems.found.append(
            f"--context {wanted.context:,} is more than the model's {positions:,} positions"
        )
    if positions is not None and positions < SIZES.longest:
        problems.found.append(
            f"settings are judged on requests of {SIZES.longest} tokens, and the model has "
            f"{positions:,} positions; use eval and eval-kv with a lower --context"
        )
    losses = problems.collect(lambda: Losses(model, checkpoint, known, text, SIZES, progress))
    problems.raise_found()
    assert losses is not None

    left_out: dict[str, str] = {}
    sizes: dict[Setting, Size] = {}
    sections = {setting: setting.kv for setting in settings()}

    def check(setting: Setting, kv: Section) -> None:
        _check(known, checkpoint, setting, kv, wanted, progress)

    def count(setting: Setting) -> None:
        sizes[setting] = _size(known, checkpoint, setting, sections[setting], wanted)

    fitted: list[Setting] = []  # those whose bases are yet to be fitted
    for setting, kv in sections.items():
        with _leaving_out(setting, left_out):
            if kv is not None and kv["policy"] == CSKV:
                check(setting, kv | {"keep": 1})  # every check, without bases
                fitted.append(setting)
            else:
                check(setting, kv)
                count(setting)
    if not sizes:
        raise CompressError(f"{model} cannot be served: {next(iter(left_out.values()))}")
    _refuse_too_little(sizes, wanted, unfitted=bool(fitted))
    losses.check_text()
    engines = side_by_side(len(settings()), checkpoint.weight_bytes)
    with engines.pool() as pool:

        def start() -> list[Future[Judged]]:
            pairs = [(each.quantization, sections[each]) for each in sizes]
            return losses.start(pairs, pool, engines.environment)

        bases = pool.submit(_bases, checkpoint, progress, engines.environment) if fitted else None
        running = start()
        for setting in fitted:
            with _leaving_out(setting, left_out):
                assert bases is not None
                kv = (setting.kv or {}) | {"bases": str(bases.result())}
                sections[setting] = kv
                check(setting, kv)
                count(setting)
        _refuse_too_little(sizes, wanted)
        for measurement in running + start():
            measurement.result()
    chosen_from = [setting for setting in sections if setting in sizes]
    rows = [
        Row(
            setting,
            sizes[setting],
            losses.weights(setting.quantization),
            losses.cache(sections[setting]),
        )
        for setting in chosen_from
    ]
    chain = frontier(row.candidate(wanted.concurrency) for row in rows)
    chosen = choose(chain, wanted.memory)
    assert chosen is not None
    return Recommendation(rows, chain, chosen, left_out, losses.measured, known.folder)


def _bases(checkpoint: Checkpoint, progress: Progress, environment: Mapping[str, str]) -> Path:
    """Fit the bases of cskv, unless they are known."""
    from vllm_plugin.commands.missing import default_bases

    return default_bases(checkpoint, progress, environment=environment)


@contextmanager
def _leaving_out(setting: Setting, left_out: dict[str, str]) -> Iterator[None]:
    """Note why a setting cannot be served."""
    try:
        yield
    except CompressError as error:
        left_out[setting.name] = "; ".join(error.problems)


def _config(kv: Section) -> dict[str, Any]:
    """The ``--additional-config`` of a section ``compress.kv``."""
    return {} if kv is None else {KEY: {"kv": kv}}


def _positions(known: Known, checkpoint: Checkpoint) -> int | None:
    """How many tokens a request can have; None: the config has no length."""

    def answer() -> dict[str, Any]:
        return {"positions": model_length(text_config(checkpoint.folder))}

    if not checkpoint.digests_are_known():  # no mistake waits until all weights are hashed
        return answer()["positions"]
    return known.ask({"ask": "positions"}, answer)["positions"]


def _size(
    known: Known, checkpoint: Checkpoint, setting: Setting, kv: Section, wanted: Wanted
) -> Size:
    """What a setting takes. CompressError where it cannot serve the model."""
    section = _config(kv)
    load: dict[str, Any] = {
        "context": wanted.context,
        "prompt": wanted.prompt,
        "utilization": wanted.utilization,
        "concurrency": wanted.concurrency,
    }

    def answer() -> dict[str, Any]:
        return asdict(size_of(str(checkpoint.folder), setting.quantization, section, **load))

    found = known.ask({"size": setting.name, "config": section, **load}, answer)
    return Size(**found | {"blocks": RequestBlocks(**found["blocks"])})


def _check(
    known: Known,
    checkpoint: Checkpoint,
    setting: Setting,
    kv: Section,
    wanted: Wanted,
    progress: Progress,
) -> None:
    """Raise CompressError where ``doctor`` refuses a setting. What was accepted needs no vLLM.

    A refusal is not kept: its reason can be this machine, such as a package that is missing.
    """
    section = _config(kv)
    question = {"accepted": setting.name, "config": section, "context": wanted.context}

    def answer() -> dict[str, Any]:
        from vllm_plugin.commands.judging.checks import check_installation, refused

        progress(f"check {setting.name}", 0, 1)
        check_installation()
        arguments = {
            "quantization": setting.quantization,
            "max_model_len": wanted.context,
            "kv_cache_memory_bytes": 1 << 30,  # or this machine's free memory would be checked
        }
        if found := refused(str(checkpoint.folder), section, arguments):
            raise CompressError("; ".join(found))
        return {}

    known.ask(question, answer)


def _refuse_too_little(sizes: dict[Setting, Size], wanted: Wanted, unfitted: bool = False) -> None:
    """Raise CompressError if nothing fits, before minutes of work.

    Args:
        sizes: of the settings that can be served.
        wanted: the device and the load.
        unfitted: settings of cskv are not among them yet. Their weights alone may be too large.
    """
    smallest = min(sizes, key=lambda setting: sizes[setting].needs(wanted.concurrency))
    size = sizes[smallest]
    if size.needs(wanted.concurrency) <= wanted.memory:
        return
    if unfitted and min(each.least for each in sizes.values()) <= wanted.memory:
        return
    fits = size.requests(wanted.memory)
    but = "but for cskv, " if unfitted else ""
    raise CompressError(
        f"no setting serves {wanted.load} in {gib(wanted.memory)}: the smallest, {but}"
        f"{smallest.name}, serves {fits} and needs {gib(size.needs(wanted.concurrency))}; lower "
        "--context or --concurrency, or give more --gpu-memory"
    )
