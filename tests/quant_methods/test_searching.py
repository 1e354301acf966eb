# SPDX-License-Identifier: Apache-2.0
"""From a model and a budget to an allocation: what it holds, and what interrupts it."""

import json
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_common.calibration.blocks import Blocks
from compress_common.calibration.collectors import Grams
from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from quant_methods import searching
from quant_methods.allocators.allocation import Allocation
from quant_methods.base import GridSettings
from quant_methods.calibration import levels as level_module
from quant_methods.calibration.derivatives import derivatives
from quant_methods.calibration.entropy import cluster_entropy, mean_ranks
from quant_methods.calibration.levels import build_levels
from quant_methods.calibration.model_probe import ModelProbe
from quant_methods.formats.plan import Plan
from quant_methods.methods.smoothquant_plus import SmoothQuantPlusSettings
from quant_methods.roundings.nearest import Nearest
from quant_methods.search_request import SearchRequest
from quant_methods.searching import search
from tests.support.interrupting import in_parts, random_numbers, stages_of
from tests.support.plans import TOKENS, load

EVOLUTION = {"generations": 4, "offspring": 3, "survivors": [2, 1], "tokens": [32, 64]}


@pytest.fixture
def request_for(tmp_path: Path) -> Callable[..., SearchRequest]:
    """``make(**changes)``: a request that takes a second."""
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8"))
    calibration = CalibrationSettings(source=str(text), samples=4, length=32)
    shared: dict[str, Any] = {"budget": 4.2, "target": "humming", "levels": (3, 4, 8)}
    shared |= {"group_size": 32, "calibration": calibration, "search_samples": 4}
    return lambda **changes: SearchRequest(**shared | changes)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """``use(name)``: make a folder the cache."""

    def use(name: str) -> Path:
        monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / name))
        return tmp_path / name

    return use


@contextmanager
def stopping(owner: object, name: str, at: int, error: BaseException) -> Iterator[list[str]]:
    """Raise at the ``at``-th call of a function. Yields the calls that went through."""
    original, done = getattr(owner, name), []

    def stopped(*args: object, **kwargs: object) -> object:
        if len(done) + 1 == at:
            raise error
        done.append(name)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopped)
        yield done


def test_levels_that_do_not_pack_are_refused(
    tiny_model: Callable[..., Path], request_for: Callable, tmp_path: Path
) -> None:
    """264 channels are whole words of 4 bits, and not of 3."""
    checkpoint = Checkpoint(tiny_model("llama", intermediate_size=264))
    with pytest.raises(CompressError, match=r"gate_proj on 1 ranks do not pack in 3 bits.*levels"):
        search(checkpoint, request_for(levels=(3, 4)))
    file = tmp_path / "bits.json"
    file.write_text(json.dumps({"bits": {"model.layers.1.gate_up": 3}}))
    told = r"gives model.layers.1.gate_up 3 bits, in which its channels on 1 ranks do not pack"
    with pytest.raises(CompressError, match=told):
        SmoothQuantPlusSettings(group_size=32, allocation=str(file)).grids(checkpoint.hf_config)


def test_an_interrupted_search_ends_as_if_it_had_not_been(
    tiny_model: Callable[..., Path], request_for: Callable, cache: Callable
) -> None:
    checkpoint = Checkpoint(tiny_model("qwen2"))
    request = request_for(method="evopress", settings=EVOLUTION)
    random = random_numbers()
    cache("whole")
    with stages_of() as names:
        whole = search(checkpoint, request)
    generations = whole.report["search"]["generations"]
    assert generations >= 1
    assert whole.report["bits_per_weight"] <= request.budget

    # At every block of the database, every generation, and one of the probes before them.
    probes = [name for name in names if name.startswith("probe ")]
    others = [name for name in names if not name.startswith(("probe ", "loss "))]
    assert len(others) >= len(structure_of(checkpoint.hf_config).pattern) + generations
    cache("parts")
    chosen = [*others, random.choice(probes[1:])]
    resumed, parts = in_parts(lambda: search(checkpoint, request), chosen, random)
    assert len(parts) == len(chosen)
    assert [name for part in parts for name in part] == names  # nothing is computed twice
    assert resumed.model_dump_json() == whole.model_dump_json()
    with stopping(ModelProbe, "__call__", 1, AssertionError("measured again")):
        assert search(checkpoint, request) == whole
    with stopping(level_module, "_block", 1, AssertionError("rounded again")):
        other = search(checkpoint, request_for(budget=5.5))  # the same levels serve
    assert whole.report["bits_per_weight"] < other.report["bits_per_weight"] <= 5.5
    assert other.report["kl_nats"] < whole.report["kl_nats"]


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes: writes then fail as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_one_error_and_loses_nothing(
    tiny_model: Callable[..., Path],
    request_for: Callable,
    cache: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, request = Checkpoint(tiny_model("qwen2")), request_for(method="baq")
    cache("whole")
    whole = search(checkpoint, request)
    folder = cache("full") / searching.KIND
    original, blocks = level_module._block, []

    def filling(*args: Any) -> dict[str, torch.Tensor]:
        blocks.append(args[2])
        made = original(*args)
        if len(blocks) == 2:  # the disk fills up before the second block is written
            limit.__enter__()
        return made

    limit = file_limit(1 << 16)
    with monkeypatch.context() as patch:
        patch.setattr(level_module, "_block", filling)
        try:
            with pytest.raises(CompressError, match=r"cannot keep the work in .*; what was fin"):
                search(checkpoint, request)
        finally:
            limit.__exit__(None, None, None)
    assert len([entry for entry in folder.iterdir() if entry.is_dir()]) == 1  # the first block
    blocks.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            level_module, "_block", lambda *args: blocks.append(args[2]) or original(*args)
        )
        assert search(checkpoint, request) == whole
    assert blocks == [1]

    cache("small")
    own = request.model_copy(update={"calibration": CalibrationSettings(samples=4, length=32)})
    told = r"not enough disk space: .* for the database of 3 levels in .*VLLM_COMPRESS_CACHE.*fewer"
    with monkeypatch.context() as patch:
        patch.setattr(
            "shutil.disk_usage", lambda _: type("Usage", (), {"total": 9000, "free": 1000})
        )
        patch.setattr(searching, "load_model", lambda *args: pytest.fail("loaded"))
        for asked in (request, own):
            with pytest.raises(CompressError, match=told):
                search(checkpoint, asked)
        cache("full")  # a finished database needs no space
        with pytest.raises(pytest.fail.Exception, match="loaded"):
            search(checkpoint, request)


def test_a_cache_that_cannot_be_used_is_refused_before_any_work(
    tiny_model: Callable[..., Path], request_for: Callable, cache: Callable
) -> None:
    folder = cache("everyone's")
    folder.mkdir(exist_ok=True)
    folder.chmod(0o777)
    with (
        stopping(searching, "load_model", 1, AssertionError("work before a refusal")),
        pytest.raises(CompressError, match=f"cannot keep the work in {folder}; set VLLM_COMPRESS"),
    ):
        search(Checkpoint(tiny_model("qwen2")), request_for())


def test_a_gram_matrix_that_cannot_be_inverted_is_named_and_loses_nothing(
    tiny_model: Callable[..., Path],
    request_for: Callable,
    cache: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, request = Checkpoint(tiny_model("qwen2")), request_for(method="baq")
    cache("broken")
    original = level_module.unit_grams

    def indefinite(plan: Plan, blocks: Blocks, index: int, *args: Any) -> dict[str, torch.Tensor]:
        grams = original(plan, blocks, index, *args)
        return {n: -g if index and "down" in n else g for n, g in grams.items()}

    with monkeypatch.context() as patch:
        patch.setattr(level_module, "unit_grams", indefinite)
        message = r"^model\.layers\.1\.down cannot be rounded: the calibration inputs .* degenerate"
        with pytest.raises(CompressError, match=message):
            search(checkpoint, request)
    with stopping(level_module, "_block", 2, AssertionError("block 0 again")):
        assert isinstance(search(checkpoint, request), Allocation)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"target": "cpu", "levels": None, "budget": 3.5}, "below the 4.6. of the lowest level: 4"),
        (
            {"target": "cpu", "levels": (4, 5)},
            "cpu cannot serve units of 5 .* serves 2, 3, 4, 8, 16",
        ),
        ({"target": "cuda", "levels": (4, 6)}, "cuda cannot serve units of 6 .*--target humming"),
        ({"target": "tpu"}, "unknown target 'tpu'; valid: cpu, cuda, humming"),
        ({"levels": (16,)}, "no level to quantize to"),
        ({"method": "probes"}, "unknown allocator 'probes'; did you mean 'probe'"),
        ({"settings": {"token": 3}}, "unknown setting 'token'; did you mean 'tokens'"),
        ({"method": "evopress", "search_samples": 1}, "measures on 2048 tokens, and .* has 32"),
        ({"search_samples": 4096}, "text.txt has .* tokens, 131200 are needed"),
    ],
)
def test_what_cannot_be_asked_for(
    tiny_model: Callable[..., Path], request_for: Callable, changes: dict, error: str
) -> None:
    checkpoint = Checkpoint(tiny_model("qwen2"))
    with (
        stopping(searching, "load_model", 1, AssertionError("work before a refusal")),
        pytest.raises(CompressError, match=error),
    ):
        search(checkpoint, request_for(**changes))


@pytest.mark.parametrize("arch", ["gemma3", "qwen3"])
def test_derivatives_are_those_of_the_whole_model(
    tiny_model: Callable[..., Path], arch: str
) -> None:
    """Against a difference quotient of the model's own loss."""
    model = load(tiny_model(arch), torch.float32)
    given = GridSettings(group_size=32)
    plan = Plan("levels", given.grids(model.config))
    blocks = Blocks(model, structure_of(model.config), TOKENS)

    def grid(bits: int, of: Any) -> Any:
        return given.grid(bits, of.group_size)

    database = build_levels(plan, blocks, Nearest(), grid, (4, 8, 16))
    found = derivatives(blocks, database)
    length = TOKENS.shape[1] - 1

    @torch.no_grad()
    def losses() -> torch.Tensor:
        log_p = model(TOKENS).logits.double().log_softmax(-1)[:, :-1]
        return -log_p.gather(-1, TOKENS[:, 1:, None]).sum((1, 2)) / length**0.5

    for unit, linears in structure_of(model.config).all_units.items():
        assert found.along[unit][16].abs().sum() == found.fisher[unit][16] == 0
        assert found.fisher[unit][4] > found.fisher[unit][8] > 0
        values = []
        for step in (1e-2, -1e-2):
            saved = {}
            for name in linears:
                weight = model.get_submodule(name).weight
                saved[name] = weight.data
                weight.data = weight + step * (database.weight(name, 4) - weight)
            values.append(losses())
            for name, data in saved.items():
                model.get_submodule(name).weight.data = data
        slope = (values[0] - values[1]) / 2e-2
        torch.testing.assert_close(found.along[unit][4], slope, rtol=0.03, atol=3e-3)


def test_entropy_of_clusters() -> None:
    centers = torch.eye(4).repeat_interleave(torch.tensor([8, 8, 16, 32]), 0) * 100
    shares = torch.tensor([0.125, 0.125, 0.25, 0.5], dtype=torch.float64)
    points = centers + torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    found = [cluster_entropy(points, 4, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert pytest.approx(-(shares * shares.log()).sum().item()) in found  # a good start finds them
    few = points[[0, 8, 16]]  # fewer points than clusters
    assert cluster_entropy(few, 9, torch.Generator()) == pytest.approx(log(3))
    values = torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 3.0]])
    assert mean_ranks(values) == [0.5, 1.0, 1.5]


def test_grams_are_not_those_of_the_search_text(
    tiny_model: Callable[..., Path], request_for: Callable, cache: Callable
) -> None:
    """The model is probed on text that no rounding was fitted to."""
    cache("texts")
    seen: dict[str, list[torch.Tensor]] = {"calibration": [], "search": []}
    original, probed = Grams.see, ModelProbe.__init__

    def see(self: Grams, linear: str, x: torch.Tensor, weights: Any) -> None:
        seen["calibration"].append(x)
        original(self, linear, x, weights)

    def init(self: ModelProbe, blocks: Blocks, *args: Any) -> None:
        seen["search"].append(blocks.tokens)
        probed(self, blocks, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Grams, "see", see)
        patch.setattr(ModelProbe, "__init__", init)
        made = search(Checkpoint(tiny_model("llama")), request_for(method="baq", search_samples=2))
    assert {len(x) for x in seen["calibration"]} == {4 * 32}
    assert seen["search"][0].shape == (2, 32) and made.report["search_tokens"] == 64
