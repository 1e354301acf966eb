# SPDX-License-Identifier: Apache-2.0
"""Whole runs: what is written, what is refused, and interruption."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from depth_pruning.cutting import MARKER
from depth_pruning.pruning import prune_checkpoint
from depth_pruning.request import PruneRequest
from tests.conftest import MORE_MODELS, TINY_MODELS
from tests.support.interrupting import in_parts, random_numbers, stages_of
from vllm_plugin.depth import described

DEPTH = 8
MIXED = (["sliding_attention"] * 3 + ["full_attention"]) * 2
# Their blocks are alike, alternate, add what norms give, or add half of their output.
ARCHITECTURES = ["llama", "gemma3", "qwen3", "phi3", "granite", "exaone4", "smollm3"]
TOKENS = torch.arange(40)[None] * 37 % 1000


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def deep_model(tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """``make(arch)``: a tiny model of eight blocks."""

    def make(arch: str = "llama", **config: Any) -> Path:
        own = (TINY_MODELS | MORE_MODELS)[arch][1]
        kinds = {"layer_types": MIXED, "sliding_window": 16} if "layer_types" in own else {}
        return tiny_model(arch, num_hidden_layers=DEPTH, **kinds | config)

    return make


@pytest.fixture
def calibration(tmp_path: Path) -> CalibrationSettings:
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8"))
    return CalibrationSettings(source=str(text), samples=16, length=32)


def request_for(calibration: CalibrationSettings, **changes: Any) -> PruneRequest:
    return PruneRequest(**{"heal": "none", "calibration": calibration} | changes)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def without(folder: Path, dropped: tuple[int, ...]) -> torch.Tensor:
    """Logits of a model in which some blocks give back their input."""
    model = load(folder)
    for index in dropped:
        model.model.layers[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
    return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_transformers_loads_what_skipping_blocks_gives(
    deep_model: Callable[..., Path], tmp_path: Path, calibration: CalibrationSettings, arch: str
) -> None:
    source, target = deep_model(arch), tmp_path / "out"
    report = prune_checkpoint(source, target, request_for(calibration, layers=(2, 5)))
    with torch.no_grad():
        found = load(target)(TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, without(source, (2, 5)), rtol=0, atol=1e-5)
    assert (found - without(source, ())).abs().max() > 0.1
    config = json.loads((target / "config.json").read_text())
    assert config["num_hidden_layers"] == DEPTH - 2
    if "layer_types" in (TINY_MODELS | MORE_MODELS)[arch][1]:
        assert config["layer_types"] == [MIXED[i] for i in (0, 1, 3, 4, 6, 7)]
    marker = config[MARKER]
    assert marker["dropped"] == [2, 5] and marker["source_layers"] == DEPTH
    assert marker["source"] == Checkpoint(source).weights_digest
    assert json.loads((target / "report.json").read_text()) == report
    assert report["loss"] == report["loss_without_healing"] and report["loss"]["kl"] > 0
    assert AutoTokenizer.from_pretrained(target)("a b").input_ids
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "text.txt"]


def test_nothing_dropped_is_the_same_model(deep_model: Callable[..., Path], tmp_path: Path) -> None:
    source, target = deep_model("gemma3"), tmp_path / "out"
    prune_checkpoint(source, target, PruneRequest(drop=0))
    assert Checkpoint(target).weights_digest == Checkpoint(source).weights_digest
    assert Checkpoint(target).digest == Checkpoint(source).digest
    assert MARKER not in json.loads((target / "config.json").read_text())


def with_identity(source: Path, folder: Path, index: int) -> Path:
    """Copy a model, with a block that adds nothing."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.{index}.{name}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


SLOW = [pytest.param(n, marks=pytest.mark.slow) for n in ("single_drop", "window", "evopress")]


@pytest.mark.parametrize("search", ["auto", "macro_influence", *SLOW])
def test_a_block_that_does_nothing_goes_at_no_loss(
    deep_model: Callable[..., Path], tmp_path: Path, calibration: CalibrationSettings, search: str
) -> None:
    source = with_identity(deep_model(), tmp_path / "model", 5)
    request = request_for(calibration, drop=1, search=search, heal="refit")
    report = prune_checkpoint(source, tmp_path / "out", request)
    assert report["dropped"] == [5]
    assert abs(report["loss_without_healing"]["kl"]) < 1e-5
    assert abs(report["loss"]["kl"]) < 1e-3


# A map of one gap has little to gain in a model of random weights.
@pytest.mark.parametrize(("heal", "most"), [("refit", 0.97), ("linear", 1.0)])
def test_healing_lowers_the_loss_on_held_out_text(
    deep_model: Callable[..., Path],
    tmp_path: Path,
    calibration: CalibrationSettings,
    heal: str,
    most: float,
) -> None:
    source, target = deep_model("granite"), tmp_path / "out"
    calibration = calibration.model_copy(update={"samples": 32})
    report = prune_checkpoint(source, target, request_for(calibration, layers=(3, 4), heal=heal))
    assert report["loss"]["kl"] < most * report["loss_without_healing"]["kl"]
    assert report["healed_linears"] == (6 if heal == "refit" else 1)  # blocks 5 to 7, or 2
    changed = {
        name
        for name, tensor in Checkpoint(target).tensors()
        if not torch.equal(tensor, dict(Checkpoint(source).tensors())[renamed_back(name)])
    }
    assert len(changed) <= report["healed_linears"] and changed


def renamed_back(name: str) -> str:
    """Return what a tensor was called before the blocks 3 and 4 were dropped."""
    parts = name.split(".")
    if parts[1] == "layers" and int(parts[2]) >= 3:
        parts[2] = str(int(parts[2]) + 2)
    return ".".join(parts)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    deep_model: Callable[..., Path],
    tmp_path: Path,
    calibration: CalibrationSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, random = deep_model(), random_numbers()
    quick = {"generations": 2, "offspring": 2}
    request = request_for(calibration, drop=2, heal="refit", search="auto", search_settings=quick)

    def pruned(name: str) -> dict[str, Any]:
        return prune_checkpoint(source, tmp_path / name, request)

    with stages_of() as names:
        whole = pruned("whole")
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path / "other"))
    kinds = ("drop ", "evopress ", "heal ", "loss ")
    found = [[name for name in names if name.startswith(kind)] for kind in kinds]
    assert all(found)
    chosen = [random.choice(some[1:] or some) for some in found]
    resumed, parts = in_parts(lambda: pruned("parts"), chosen, random)
    assert len(parts) > 1
    assert [name for part in parts for name in part] == names  # nothing is computed twice
    assert resumed == whole
    digests = {Checkpoint(tmp_path / name).digest for name in ("whole", "parts")}
    assert len(digests) == 1


def test_max_loss_takes_as_many_as_it_allows(
    deep_model: Callable[..., Path], tmp_path: Path, calibration: CalibrationSettings
) -> None:
    source = with_identity(deep_model(), tmp_path / "one", 5)
    source = with_identity(source, tmp_path / "two", 2)
    request = request_for(calibration, max_loss=1e-4, search="single_drop", force=True)
    report = prune_checkpoint(source, tmp_path / "out", request)
    assert report["dropped"] == [2, 5]
    assert set(report["tried"]) == {"3", "2"} or set(report["tried"]) == {"3", "1", "2"}
    with pytest.raises(CompressError, match="no block can go for a loss of 1e-06 nats"):
        prune_checkpoint(
            deep_model(), tmp_path / "none", request.model_copy(update={"max_loss": 1e-6})
        )
    assert not (tmp_path / "none").exists()


def test_max_loss_takes_fewer_where_a_search_leaves_blocks_out(
    deep_model: Callable[..., Path], tmp_path: Path, calibration: CalibrationSettings
) -> None:
    """Half of the inner blocks do nothing, so the others cost far more than the median."""
    source = deep_model()
    for index in (2, 3, 5):
        source = with_identity(source, tmp_path / f"without-{index}", index)
    settings = {"far": 1.5, "generations": 0}
    request = request_for(calibration, max_loss=100.0, search_settings=settings, force=True)
    report = prune_checkpoint(source, tmp_path / "out", request)
    assert report["dropped"] == [2, 3, 5]
    assert set(report["tried"]) == {"3"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layers": (0,)}, "block 0 cannot be dropped"),
        ({"layers": (7, 9)}, "there is no block 9.*\n.*block 7 cannot be dropped"),
        ({"drop": 8}, "8 blocks cannot go: the model has 8"),
        ({"drop": 7, "force": True}, "at most 6 of 8 blocks can go"),
        ({"drop": 3}, "more than a quarter.*drop 2 or fewer, or give --force"),
        ({"drop": 1, "search": "greed"}, "did you mean 'greedy'"),
        ({"drop": 1, "heal": "refits"}, "did you mean 'refit'"),
    ],
)
def test_bad_requests_are_refused_before_the_work(
    deep_model: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with stages_of() as done, pytest.raises(CompressError, match=told):
        prune_checkpoint(deep_model(), tmp_path / "out", PruneRequest(**changes))
    assert not done
    assert not [path for path in tmp_path.iterdir() if path.name != "cache"]


@pytest.mark.parametrize(
    ("arch", "config", "told"),
    [
        ("qwen3_moe", {}, "routed experts"),
        ("llama", {"num_kv_shared_layers": 2}, "share keys and values"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "already quantized"),
    ],
)
def test_models_are_refused_before_the_work(
    tiny_model: Callable[..., Path], tmp_path: Path, arch: str, config: dict[str, Any], told: str
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_model(arch), source)
    content = json.loads((source / "config.json").read_text()) | config
    (source / "config.json").write_text(json.dumps(content))
    with pytest.raises(CompressError, match=told) as refused:
        prune_checkpoint(source, tmp_path / "out", PruneRequest(layers=(0,)))
    assert "block 0 cannot be dropped" in str(refused.value)  # all problems at once


def test_a_dear_block_needs_force(
    deep_model: Callable[..., Path],
    tmp_path: Path,
    calibration: CalibrationSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No block of a random model costs a nat, so here less is dear."""
    monkeypatch.setattr("depth_pruning.finding.DEAR", 1e-4)
    source, request = deep_model(), request_for(calibration, layers=(1,))
    with pytest.raises(CompressError, match="these cost more: block 1 .*give --force"):
        prune_checkpoint(source, tmp_path / "out", request)
    report = prune_checkpoint(source, tmp_path / "out", request.model_copy(update={"force": True}))
    assert report["kl_alone"]["1"] > 1e-4


def test_fusing_changes_the_neighbors_of_a_gap_alone(
    deep_model: Callable[..., Path], tmp_path: Path, calibration: CalibrationSettings
) -> None:
    """In a model that the closed forms refuse: it has norms behind attention and MLP."""
    quick = {"steps": 4, "reach": 1, "rank": 4}
    asked = {"layers": (3, 4), "heal": "fusegpt", "heal_settings": quick}
    source, target = deep_model("gemma3"), tmp_path / "out"
    report = prune_checkpoint(source, target, request_for(calibration, **asked))
    assert report["healed_linears"] == 14
    assert report["loss"]["kl"] < 1.05 * report["loss_without_healing"]["kl"]
    before = dict(Checkpoint(source).tensors())
    changed = {
        renamed_back(name).split(".")[2]
        for name, tensor in Checkpoint(target).tensors()
        if not torch.equal(tensor, before[renamed_back(name)])
    }
    assert changed == {"2", "5"}


def test_fusing_that_diverges_keeps_the_weights(
    deep_model: Callable[..., Path], tmp_path: Path, calibration: CalibrationSettings
) -> None:
    wild = {"steps": 2, "reach": 1, "rank": 4, "learning_rate": 100.0}
    asked = {"layers": (3, 4), "heal": "fusegpt", "heal_settings": wild}
    source, target = deep_model(), tmp_path / "out"
    report = prune_checkpoint(source, target, request_for(calibration, **asked))
    assert report["loss"] == report["loss_without_healing"]


def test_what_was_pruned_before_stays_noted(
    deep_model: Callable[..., Path], tmp_path: Path, calibration: CalibrationSettings
) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    prune_checkpoint(deep_model(), once, request_for(calibration, layers=(2,)))
    prune_checkpoint(once, twice, request_for(calibration, layers=(4,)))
    told = described(AutoConfig.from_pretrained(twice))
    assert told == (
        "blocks 4 of 7 are gone, healed by none; before that, "
        "blocks 2 of 8 are gone, healed by none"
    )


def test_norms_behind_attention_are_refused_by_closed_forms(
    deep_model: Callable[..., Path], tmp_path: Path, calibration: CalibrationSettings
) -> None:
    request = request_for(calibration, drop=1, heal="refit")
    with stages_of() as done, pytest.raises(CompressError, match="give --heal"):
        prune_checkpoint(deep_model("gemma3"), tmp_path / "out", request)
    assert not done  # before the search


def test_blocks_that_depend_on_their_place_are_refused(
    deep_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a list of the config had another name than we know."""
    monkeypatch.setattr("depth_pruning.cutting.per_layer_keys", lambda config, depth: [])
    with pytest.raises(CompressError, match="would differ in|refuses the config of the cut model"):
        prune_checkpoint(deep_model("exaone4"), tmp_path / "out", PruneRequest(layers=(3,)))
