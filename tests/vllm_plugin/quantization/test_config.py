# SPDX-License-Identifier: Apache-2.0
"""The config classes that vLLM knows our methods by."""

import pickle

import pytest

from quant_methods.methods.rtn import RoundToNearest
from vllm_plugin.quantization import config


@pytest.mark.parametrize(
    "name", ["smoothquant_Plus", "smoothquantPlus", "method", "compressed_tensors", "my-method"]
)
def test_each_method_has_its_own_class(name: str) -> None:
    """Also where names differ in case alone, or where a class of vLLM has a similar one."""
    before = dict(vars(config))
    made = config._config_class(type("Theirs", (RoundToNearest,), {"name": name}))
    assert issubclass(made, config.MethodConfig) and made().get_name() == name
    assert type(pickle.loads(pickle.dumps(made()))) is made
    assert made.__name__ not in before
    delattr(config, made.__name__)
