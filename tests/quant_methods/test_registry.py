# SPDX-License-Identifier: Apache-2.0
import pytest

from quant_methods.errors import CompressError
from quant_methods.registry import build_method, methods


def test_built_in_methods() -> None:
    assert {"smoothquant_plus", "rtn"} <= methods().keys()
    for name, method in methods().items():
        assert method.name == name
        assert method.__doc__


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(CompressError, match="did you mean 'smoothquant_plus'"):
        build_method("smoothquant", {})


def test_all_bad_settings_are_listed_at_once() -> None:
    with pytest.raises(CompressError) as caught:
        build_method("smoothquant_plus", {"groupsize": 64, "alpha": 3})
    text = str(caught.value)
    assert "did you mean 'group_size'" in text
    assert "smoothquant_plus.alpha" in text
    assert "2 problems" in text
