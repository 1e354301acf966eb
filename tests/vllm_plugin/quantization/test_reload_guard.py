# SPDX-License-Identifier: Apache-2.0
"""A reload that fails keeps all of the present weights, or leaves a model that cannot run."""

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from compress_common.checkpoints.identity import tensor_digest
from compress_common.errors import CompressError
from quant_methods.formats.plan import Plan
from vllm_plugin.quantization.loader import QuantizedStream
from vllm_plugin.quantization.reload import Source, guard_weights, present_kept

PRESENT = Source("digest", "model", "s3://model", "main")
NEW = {"a.weight": torch.full((2, 2), 2.0), "b.weight": torch.full((2, 2), 3.0)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            parameter: Any = self.get_parameter(name)
            parameter.weight_loader(parameter, tensor)


@pytest.fixture
def config() -> Any:
    return SimpleNamespace(
        model="model", model_weights="s3://model", revision="main", dtype=torch.float32
    )


@pytest.fixture
def quant_config() -> Any:
    return SimpleNamespace(source=PRESENT)


@pytest.fixture
def model(config: Any, quant_config: Any) -> Model:
    with torch.device("cpu"):
        made = Model()
        record_metadata_for_reloading(made)
    guard_weights(made, config, quant_config, QuantizedStream)
    return made


def reload(model: Model, config: Any, quant_config: Any, tensors: dict[str, torch.Tensor]) -> None:
    """As vLLM does it, with a plan for ``NEW``."""
    config.model, config.model_weights, config.revision = "other", "", None
    quant_config.source = Source.now("other digest", config)
    sources = {name: tensor_digest(tensor) for name, tensor in NEW.items()}
    plan = Plan("rtn", {}, {}, {}, {}, {}, sources)
    stream = QuantizedStream(plan, tensors.items(), torch.float32, torch.device("cpu"))
    initialize_layerwise_reload(model)
    model.load_weights(stream)
    finalize_layerwise_reload(model, config)


def test_a_whole_stream_is_taken(model: Model, config: Any, quant_config: Any) -> None:
    reload(model, config, quant_config, NEW)
    assert all(torch.equal(model.get_parameter(name), NEW[name]) for name in NEW)
    with pytest.raises(CompressError, match="16-bit tensors"):
        initialize_layerwise_reload(model)
        model.load_weights(list(NEW.items()))
    assert all(torch.equal(model.get_parameter(name), NEW[name]) for name in NEW)


def test_a_failure_at_the_first_tensor_keeps_the_present_weights(
    model: Model, config: Any, quant_config: Any
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CompressError, match="a.weight has other content"):
        reload(model, config, quant_config, NEW | {"a.weight": torch.zeros(2, 2)})
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in before)
    assert quant_config.source == PRESENT == Source.now("digest", config)


def test_a_failure_in_the_middle_leaves_a_model_that_cannot_run(
    model: Model, config: Any, quant_config: Any
) -> None:
    with pytest.raises(CompressError, match=r"b.weight has other content.*restart the engine"):
        reload(model, config, quant_config, NEW | {"b.weight": torch.zeros(2, 2)})
    assert model.b.weight.is_meta
    for tensors in (NEW, list(NEW.items())):  # nor does another reload go on from there
        with pytest.raises(CompressError, match="restart the engine"):
            model.load_weights(tensors)  # type: ignore[arg-type]
    assert model.b.weight.is_meta


def test_any_failure_before_the_stream_forgets_the_new_path(config: Any, quant_config: Any) -> None:
    config.model, config.model_weights, config.revision = "other", "", None
    with pytest.raises(KeyboardInterrupt), present_kept(quant_config, config):
        raise KeyboardInterrupt
    assert Source.now("digest", config) == PRESENT
