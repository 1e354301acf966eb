# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress_common.errors import CompressError
from depth_pruning.cutting import (
    block_numbers,
    block_prefix,
    cut_config,
    kept_blocks,
    per_layer_keys,
    ranges,
    renamed,
)


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    """A depth, and the blocks of it that stay."""
    depth = draw(st.integers(2, 40))
    dropped = draw(st.sets(st.integers(0, depth - 1), max_size=depth - 1))
    return depth, kept_blocks(depth, dropped)


@given(cuts())
def test_renamed_blocks_are_numbered_without_gaps(cut: tuple[int, tuple[int, ...]]) -> None:
    depth, kept = cut
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(depth)]
    found = [renamed(name, "model.layers.", kept, depth) for name in names]
    wanted = [f"model.layers.{place}.mlp.up_proj.weight" for place in range(len(kept))]
    assert [name for name in found if name is not None] == wanted
    assert [index for index, name in enumerate(found) if name is not None] == list(kept)


@given(cuts())
def test_other_tensors_keep_their_names(cut: tuple[int, tuple[int, ...]]) -> None:
    depth, kept = cut
    for name in ("lm_head.weight", "model.norm.weight", "model.layers_norm.3.weight"):
        assert renamed(name, "model.layers.", kept, depth) == name
    behind = renamed(f"model.layers.{depth}.eh_proj.weight", "model.layers.", kept, depth)
    assert behind == f"model.layers.{len(kept)}.eh_proj.weight"


@given(st.sets(st.integers(0, 99), min_size=1))
def test_block_numbers_read_what_ranges_writes(numbers: set[int]) -> None:
    assert block_numbers(ranges(numbers)) == tuple(sorted(numbers))


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "1-", "2.5"])
def test_what_is_no_list_of_blocks_is_refused(text: str) -> None:
    with pytest.raises(CompressError, match="is no list of blocks"):
        block_numbers(text)


def test_a_block_that_no_model_has_is_refused_before_it_is_counted_to() -> None:
    with pytest.raises(CompressError, match="no model has a block 4000000000"):
        block_numbers("1-4000000000")


@given(cuts(), st.data())
def test_lists_of_a_config_follow_the_blocks(
    cut: tuple[int, tuple[int, ...]], data: st.DataObject
) -> None:
    depth, kept = cut
    kinds = data.draw(
        st.lists(st.sampled_from(["full", "sliding"]), min_size=depth, max_size=depth)
    )
    written: dict[str, Any] = {"num_hidden_layers": depth, "architectures": ["A"] * depth}
    complete = written | {"layer_types": kinds, "eos_token_id": list(range(depth))}
    found = cut_config(written, complete, kept, depth)
    assert found["num_hidden_layers"] == len(kept)
    assert found["architectures"] == written["architectures"]
    expected = [kinds[index] for index in kept]
    if len(kept) == depth:
        assert found == written
    elif len(set(kinds)) > 1:  # transformers would derive it from the depth again
        assert found["layer_types"] == expected
    else:
        assert "layer_types" not in found
    assert "eos_token_id" not in found


@given(cuts(), st.integers(0, 50))
def test_the_first_windowed_layer_stays_the_same_block(
    cut: tuple[int, tuple[int, ...]], first: int
) -> None:
    depth, kept = cut
    written = {"num_hidden_layers": depth, "max_window_layers": first}
    found = cut_config(written, written, kept, depth)
    if len(kept) < depth:
        windowed = [index >= first for index in kept]
        assert [place >= found["max_window_layers"] for place in range(len(kept))] == windowed


def test_a_depth_of_another_name_is_cut_too() -> None:
    found = cut_config({"n_layer": 4}, {"n_layer": 4}, (0, 3), 4, "n_layer")
    assert found == {"n_layer": 2}


def test_lists_of_other_things_are_not_per_layer() -> None:
    config = {"eos_token_id": [1, 2], "architectures": ["A", "B"], "layer_types": ["f", "s"]}
    assert per_layer_keys(config, 2) == ["layer_types"]


def test_the_prefix_of_blocks_is_found_from_names() -> None:
    names = [f"bert.encoder.layer.{i}.{n}" for i in range(3) for n in ("a.weight", "b.weight")]
    others = [f"bert.heads.{i}.weight" for i in range(3)]
    assert block_prefix([*names, *others, "pooler.weight"], 3) == "bert.encoder.layer."
    assert block_prefix(["layers.0.a", "layers.1.a"], 2) == "layers."
    with pytest.raises(CompressError, match="not those of 4 numbered blocks"):
        block_prefix(names, 4)
