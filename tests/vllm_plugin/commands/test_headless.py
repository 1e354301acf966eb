# SPDX-License-Identifier: Apache-2.0
"""Models without a language-model head: the commands and the engine refuse what needs one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

import vllm_plugin
from compress_common.errors import CompressError
from quant_methods.formats.writing import quantize_checkpoint
from tests.support import pooling
from vllm_plugin.commands.checks import model_checks
from vllm_plugin.settings import WeightSettings


def gptq(text: Path, **more: Any) -> dict[str, Any]:
    """Settings of smoothquant_plus, on a given text."""
    calibration = {"source": str(text), "samples": 8, "length": 32}
    return {"group_size": 32, "calibration": calibration} | more


def test_rotated_hidden_states_are_not_pooled(
    tiny_model: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    vllm_plugin.register()
    for rotation, told in (("both", "are rotated, which its lm_head undoes"), ("heads", None)):
        folder = tmp_path / rotation
        request = WeightSettings(**gptq(text, rotation=rotation)).request("rsq", 1)
        quantize_checkpoint(tiny_model("qwen2"), folder, request)
        for runner, problem in (("pooling", told), ("generate", None)):
            args = EngineArgs(str(folder), runner=runner, max_model_len=256)
            if problem is None:
                assert args.create_engine_config()
                continue
            with pytest.raises(CompressError, match=f"--runner pooling: .*{problem}"):
                args.create_engine_config()


@pytest.mark.parametrize("name", pooling.MODELS)
def test_what_needs_a_head_is_refused_before_any_work(
    tmp_path: Path, demo_model: Path, text: Path, run: Callable[..., Any], name: str
) -> None:
    folder = pooling.make(name, tmp_path / "model", demo_model)
    told = "has no language-model head, it embeds or classifies; it samples no calibration text"
    vllm_plugin.register()

    def checked(**settings: Any) -> str:
        """What doctor finds wrong, which is what the engine refuses."""
        section = {"compress": {"weights": settings}}
        args = EngineArgs(
            str(folder),
            quantization="smoothquant_plus",
            additional_config=section,
            max_model_len=256,
            kv_cache_memory_bytes=1 << 24,
        )
        return "; ".join(c.found for c in model_checks(args) if c.status == "problem")

    plan = ("plan", folder, "--gpu-memory", "1GiB", "--context", "256", "--quantization")
    code, _, errors = run(*plan, "smoothquant_plus")
    assert code == 1 and told in errors.replace("\n", " ")
    assert run(*plan, "rtn")[0] == 0
    assert told in checked()
    assert not checked(**gptq(text))
    alpha = "alpha is searched by the loss of next tokens: give alpha"
    assert alpha in checked(**gptq(text, folds="norms"))
    assert not checked(**gptq(text, alpha=0.5))
    for settings, found in (({}, told), (gptq(text, folds="norms"), alpha)):
        with pytest.raises(CompressError, match=found):
            quantize_checkpoint(
                folder, tmp_path / "out", WeightSettings(**settings).request("smoothquant_plus", 1)
            )
    both = WeightSettings(**gptq(text, rotation="both")).request("rsq", 1)
    with pytest.raises(CompressError, match="turns the last hidden states"):
        quantize_checkpoint(folder, tmp_path / "out", both)
    small = WeightSettings(embeddings="int8").request("rtn", 1)
    with pytest.raises(CompressError, match="quantized embeddings were not tested there"):
        quantize_checkpoint(folder, tmp_path / "out", small)
    code, _, errors = run("search", folder, "--budget", 6, "--target", "cuda", "--out", "bits.json")
    assert code == 1 and "has no language-model head, by whose logits" in errors.replace("\n", " ")
    assert {file.name for file in tmp_path.iterdir()} == {"model", "text.txt"}
