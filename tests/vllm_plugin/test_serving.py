# SPDX-License-Identifier: Apache-2.0
"""The main job on the real engine: 16-bit, written and exported checkpoints answer alike."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.structure.derive import structure_of
from quant_methods.formats.writing import quantize_checkpoint
from quant_methods.grid import QuantizedWeight
from quant_methods.plan_request import PlanRequest
from quant_methods.planning import obtain_plan
from tests.conftest import TINY_MODELS
from tests.support.child import EngineFailed
from tests.support.generate import QUICK_WEIGHTS, generate
from vllm_plugin.settings import WeightSettings

PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "The three primary colours are",
    "def fibonacci(n):",
    "Water boils at",
    "In 1969, humans first",
    "The largest planet in the solar system is",
    "To make a cup of tea, first",
    "The quick brown fox",
    "She opened the door and",
]
EAGER = {"TORCH_COMPILE_DISABLE": "1"}  # the dequantizer's compiled form has tests of its own
# Each engine would measure where to change over, and a busy machine may give another number.
SAME_ROUNDING = {"COMPRESS_INT4_ROWS": "16"}
QUICK = {"calibration": {"samples": 2, "length": 16}, "alpha": 0.5, "group_size": 32}


def settings(**weights: object) -> dict:
    return {"compress": {"weights": weights}}


@pytest.fixture(scope="module")
def written(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as the command line writes it."""
    target = tmp_path_factory.mktemp("written") / "int4"
    request = WeightSettings(**QUICK_WEIGHTS).request("smoothquant_plus", 1)
    quantize_checkpoint(demo_model, target, request)
    return target


@pytest.fixture(scope="module")
def from_written(written: Path) -> dict:
    return generate(written, PROMPTS, max_tokens=8, env=SAME_ROUNDING)


def test_written_checkpoint_is_ours(from_written: dict) -> None:
    assert from_written["quantization"] == "smoothquant_plus"
    assert "Paris" in from_written["texts"][0]


def test_quantizing_at_load_gives_the_same_text(demo_model: Path, from_written: dict) -> None:
    raw = generate(
        demo_model,
        PROMPTS,
        max_tokens=8,
        quantization="smoothquant_plus",
        additional_config=settings(**QUICK_WEIGHTS),
        env=SAME_ROUNDING,
    )
    assert raw["tokens"] == from_written["tokens"]


@pytest.mark.slow
def test_default_settings(demo_model: Path, tmp_path: Path) -> None:
    """As above with the calibration that users get, which takes minutes on some processors."""
    quantize_checkpoint(demo_model, tmp_path / "int4", PlanRequest())
    written = generate(tmp_path / "int4", PROMPTS, env=SAME_ROUNDING)
    raw = generate(demo_model, PROMPTS, quantization="smoothquant_plus", env=SAME_ROUNDING)
    assert raw["tokens"] == written["tokens"]
    assert "Paris" in written["texts"][0]


@pytest.fixture
def stock_int4() -> None:
    """Skip where vLLM itself has no int4 kernel: on a CPU it needs AVX-512."""
    from vllm import _custom_ops  # noqa: F401  (loads the operations)

    if not torch.cuda.is_available() and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("stock vLLM has no int4 kernel for this processor")


@pytest.mark.usefixtures("stock_int4")
def test_stock_vllm_serves_the_export(written: Path, from_written: dict) -> None:
    """Plugin off. On AMX both run vLLM's kernel: equal. Elsewhere ours rounds differently.

    Without AMX each is 0.07 nats a token from float32, either way; a wrong weight costs whole nats.
    """
    stock = generate(written, PROMPTS, max_tokens=8, env={"VLLM_PLUGINS": ""})
    assert stock["quantization"] == "compressed-tensors"
    if torch.cpu._is_amx_tile_supported():
        assert stock["tokens"] == from_written["tokens"]
    else:
        nats = [torch.tensor(sum(x["prompt_nats"], [])) for x in (stock, from_written)]
        difference = nats[0] - nats[1]
        assert difference.abs().mean() < 0.1 and difference.mean().abs() < 0.05
        same = zip(stock["tokens"], from_written["tokens"], strict=True)
        assert sum(a == b for a, b in same) >= 8


@pytest.mark.usefixtures("stock_int4")
def test_stock_vllm_serves_the_awq_export(demo_model: Path, tmp_path: Path) -> None:
    request = PlanRequest(settings={"alpha": 0.5, "clip": False, "rounding": "nearest"})
    quantize_checkpoint(demo_model, tmp_path / "awq", request, format_name="awq")
    stock = generate(tmp_path / "awq", PROMPTS[:2], env={"VLLM_PLUGINS": ""})
    assert "Paris" in stock["texts"][0]


@pytest.mark.usefixtures("stock_int4")
def test_stock_vllm_answers_from_a_mixed_checkpoint(demo_model: Path, tmp_path: Path) -> None:
    """4 bits in even layers, 8 in odd ones. With the plugin, tests of bits serve one anywhere."""
    units = structure_of(Checkpoint(demo_model).hf_config).all_units
    bits = {unit: 8 if int(unit.split(".")[2]) % 2 else 4 for unit in units}
    allocation = tmp_path / "bits.json"
    allocation.write_text(json.dumps({"bits": bits}))
    mixed = {"allocation": str(allocation), "group_size": 64}
    quantize_checkpoint(demo_model, tmp_path / "mixed", PlanRequest(method="rtn", settings=mixed))
    ours = generate(tmp_path / "mixed", PROMPTS[:4], env=SAME_ROUNDING)
    assert ours["quantization"] == "rtn" and "Paris" in ours["texts"][0]
    stock = generate(tmp_path / "mixed", PROMPTS[:4], env={"VLLM_PLUGINS": ""})
    assert stock["quantization"] == "compressed-tensors" and "Paris" in stock["texts"][0]
    nats = [torch.tensor(sum(x["prompt_nats"], [])) for x in (stock, ours)]
    assert (nats[0] - nats[1]).mean().abs() < 0.1


@torch.no_grad()
def reference_nats(folder: Path, request: PlanRequest) -> list[float]:
    """Prompt nats of the same plan applied to transformers' own model, weights dequantized."""
    checkpoint = Checkpoint(folder)
    plan, _ = obtain_plan(checkpoint, request)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    state = {}
    for name, value in plan.transform(checkpoint.tensors(), torch.bfloat16):
        if isinstance(value, QuantizedWeight):
            state[f"{name}.weight"] = value.dequantize()
        else:
            state[name] = value
    model.load_state_dict(state, strict=False)  # a tied head is not in the file
    nats: list[float] = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        logits = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
        nats += (-logits.gather(-1, ids[0, 1:, None])[:, 0]).tolist()
    return nats


@pytest.mark.parametrize(
    "arch",
    [  # mistral has llama's layers; qwen3's are qwen2's with norms that no fold touches
        pytest.param(arch, marks=[pytest.mark.slow] if arch in ("mistral", "qwen3") else [])
        for arch in sorted(TINY_MODELS)
    ],
)
def test_every_architecture_serves_its_plan(
    tiny_model: Callable[..., Path],
    arch: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A wrong fold, fused shard, zero point or bias in vLLM would cost whole nats."""
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path))
    folder = tiny_model(arch)
    weights = QUICK | {"folds": "all", "activations": "bf16"}
    served = generate(
        folder,
        PROMPTS,
        max_tokens=1,
        quantization="smoothquant_plus",
        additional_config=settings(**weights),
        env=EAGER,
    )
    nats = torch.tensor(sum(served["prompt_nats"], []))
    request = WeightSettings(**weights).request("smoothquant_plus", 1)
    difference = (nats - torch.tensor(reference_nats(folder, request))).abs()
    assert difference.mean() < 0.05  # bf16 activations against fp32
    assert difference.max() < 0.5


def test_linears_that_no_group_divides_are_served_at_16_bits(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """down_proj has 272 inputs. At load and from the written checkpoint, with folds around it."""
    monkeypatch.setenv("VLLM_COMPRESS_CACHE", str(tmp_path))
    folder = tiny_model("llama", intermediate_size=272)
    weights = QUICK | {"folds": "all", "activations": "bf16"}
    request = WeightSettings(**weights).request("smoothquant_plus", 1)
    quantize_checkpoint(folder, tmp_path / "int4", request)
    at_load = {"quantization": "smoothquant_plus", "additional_config": settings(**weights)}
    said = [
        generate(model, PROMPTS, max_tokens=1, env=EAGER | SAME_ROUNDING, **arguments)
        for model, arguments in ((folder, at_load), (tmp_path / "int4", {}))
    ]
    assert said[0]["prompt_nats"] == said[1]["prompt_nats"]
    nats = torch.tensor(sum(said[0]["prompt_nats"], []))
    assert (nats - torch.tensor(reference_nats(folder, request))).abs().mean() < 0.05


def test_two_ranks_agree_with_one(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Of tensors in halves, and of stages with half of the layers each."""
    folder = tiny_model("qwen2")
    nats = []
    for ranks, stages in ((1, 1), (2, 1), (1, 2)):
        answer = generate(
            folder,
            [" ".join(PROMPTS)],  # of several, an engine may begin before it has all: other batches
            max_tokens=1,
            quantization="smoothquant_plus",
            additional_config=settings(**QUICK, activations="bf16"),
            tensor_parallel_size=ranks,
            pipeline_parallel_size=stages,
            env={
                **EAGER,
                **SAME_ROUNDING,
                "VLLM_COMPRESS_CACHE": str(tmp_path),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            },
        )
        nats.append(torch.tensor(sum(answer["prompt_nats"], [])))
    # Same codes on all; ranks only change the order of sums in bf16, and stages nothing.
    assert (nats[0] - nats[1]).abs().mean() < 0.03
    assert torch.equal(nats[0], nats[2])


@pytest.mark.parametrize(
    ("engine_args", "expected"),
    [
        (
            {"additional_config": settings(groupsize=64)},
            r"unknown setting 'groupsize'; did you mean 'group_size'",
        ),
        ({"additional_config": {"compress": {"weight": {}}}}, r"did you mean 'weights'"),
        ({"additional_config": settings(activations="int4")}, r"'auto', 'bf16' or 'int8'"),
        (
            {"quantization": None, "additional_config": settings()},
            "--quantization smoothquant_plus",
        ),
        (
            {
                "load_format": "sharded_state",
                "enable_lora": True,
                "additional_config": settings(alpha=0.5),
            },
            r"2 problems:(.|\n)*--enable-lora",
        ),
    ],
)
def test_bad_settings_are_refused_at_start(
    tiny_model: Callable[..., Path], engine_args: dict, expected: str
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from compress_common.errors import CompressError

    arguments = {"quantization": "smoothquant_plus"} | engine_args
    with pytest.raises(CompressError, match=expected):
        EngineArgs(model=str(tiny_model("llama")), **arguments).create_engine_config()


def test_int8_activations_are_refused_where_no_kernel_rounds_them(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    from vllm_plugin.quantization.kernels import kernel_problems

    args = EngineArgs(model=str(tiny_model("llama")), quantization="smoothquant_plus")
    config = args.create_engine_config()
    told = "additional_config.compress.weights.activations is 'int8', which only kernels for CPUs"
    config.quant_config.activations = "int8"
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: False)
    assert any(problem.startswith(told) for problem in kernel_problems(config))
    config.quant_config.activations = "auto"
    assert not any(problem.startswith(told) for problem in kernel_problems(config))


def test_settings_of_a_written_checkpoint_are_fixed(written: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ValueError, match="group_size.*quantized already"):
        EngineArgs(
            model=str(written), additional_config=settings(group_size=64)
        ).create_engine_config()


def test_a_quantized_checkpoint_of_another_kind_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    request = PlanRequest(
        settings={"alpha": 0.5}, calibration=CalibrationSettings(samples=2, length=16)
    )
    quantize_checkpoint(tiny_model("llama"), tmp_path / "awq", request, format_name="awq")
    with pytest.raises(ValueError, match="16-bit checkpoint"):
        EngineArgs(
            model=str(tmp_path / "awq"), quantization="smoothquant_plus"
        ).create_engine_config()


def test_damaged_weights_stop_the_engine(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(EngineFailed, match="damaged or incomplete"):
        generate(folder, PROMPTS[:1], quantization="smoothquant_plus")


def test_a_scale_that_is_not_a_number_stops_the_engine(written: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(written, folder)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("o_proj.weight_scale"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(EngineFailed, match=f"{name} holds NaN or infinity"):
        generate(folder, PROMPTS[:1])
