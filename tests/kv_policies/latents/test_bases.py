# SPDX-License-Identifier: Apache-2.0
import json
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from compress_common.errors import CompressError
from kv_policies.latents.bases import Bases
from kv_policies.latents.bases_header import (
    SIDES,
    Header,
    Layer,
    even_ranks,
    exact_ratio,
    ratio_problem,
    split_problem,
    token_room,
)
from kv_policies.latents.format import Bits, LatentFormat
from kv_policies.latents.low_rank import Factor
from kv_policies.model_file import Calibration
from tests.support.kv_files import fingerprint

MODEL = fingerprint()
CALIBRATION = Calibration(
    tool_version="0.1.0", created="2026-01-01T00:00:00Z", text="t", samples=3, sample_tokens=9
)
RANKS = ((3, 3), (5, 1), (2, 4))


def header(**changes: Any) -> Header:
    values: dict[str, Any] = {
        "model": MODEL,
        "weights": "0" * 64,
        "bits": 16,
        "ratio": "0.8",
        "objective": "reconstruction",
        "layers": [
            Layer(layer=i, key_rank=k, value_rank=v, key_error=0.1, value_error=0.2)
            for i, (k, v) in enumerate(RANKS)
        ],
        "calibration": CALIBRATION,
    }
    return Header(**(values | changes))


def test_bases_that_lose_much_of_the_values_are_doubtful() -> None:
    def lost(error: float, objective: str) -> str | None:
        layers = [
            Layer(layer=i, key_rank=k, value_rank=v, key_error=0.1, value_error=error)
            for i, (k, v) in enumerate(RANKS)
        ]
        return header(layers=layers, objective=objective).doubt

    assert lost(0.2, "attention") is None
    assert lost(0.9, "reconstruction") is None  # another measure
    assert "lose 0.44 of the energy of values" in str(lost(0.44, "attention"))


def bases(shards: int = 1) -> Bases:
    generator = torch.Generator().manual_seed(0)
    features = 16 // shards

    def factor(rank: int) -> Factor:
        encode = torch.randn(features, rank, generator=generator)
        mean = torch.randn(features, generator=generator)
        return Factor(encode, torch.linalg.pinv(encode), mean)

    ranks = {(i, s): r for i, both in enumerate(RANKS) for s, r in zip(SIDES, both, strict=True)}
    own = {"tensor_parallel": shards, "ratio": 1 - Fraction(shards, 5)}
    factors = [{key: factor(rank) for key, rank in ranks.items()} for _ in range(shards)]
    return Bases(header(**own), factors)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "b.safetensors"
    bases().save(path)
    return path


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Bases for two ranks."""
    path = tmp_path / "two.safetensors"
    bases(2).save(path)
    return path


@pytest.fixture
def edit(file: Path) -> Callable[..., Path]:
    """``edit(change)``: the file after ``change(header, tensors)`` in place."""

    def edit(change: Callable[[dict, dict], Any]) -> Path:
        with safe_open(file, framework="pt") as opened:
            content = json.loads(opened.metadata()["vllm-compress"])
            tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
        change(content, tensors)
        save_file(tensors, file, {"vllm-compress": json.dumps(content)})
        return file

    return edit


def test_ratio_is_what_the_user_typed() -> None:
    assert exact_ratio(0.8) == exact_ratio("0.8") == exact_ratio("4/5") == Fraction(4, 5)
    assert exact_ratio(0) == 0
    for bad in (1, -0.1, "abc", "1/0", float("nan")):
        with pytest.raises(CompressError, match=r"\[0, 1\), got"):
            exact_ratio(bad)


@given(
    st.fractions(0, Fraction(39, 40), max_denominator=40),
    st.integers(16, 2048),
    st.sampled_from([4, 16]),
)
def test_even_ranks_are_the_most_that_fit(ratio: Fraction, features: int, bits: Bits) -> None:
    key, value = even_ranks(ratio, features, bits)
    room, size = token_room(ratio, features), LatentFormat.token_bytes
    assert 1 <= key <= value <= key + 1 and value <= features
    assert size(key, value, bits) <= room or (key, value) == (1, 1)
    more = (key, value + 1) if key == value else (value, value)
    assert key + value == 2 * features or size(*more, bits) > room
    fits = size(1, 1, bits) <= room <= size(features, features, bits)
    assert (ratio_problem(ratio, features, bits) is None) is fits


def test_ratios_that_no_ranks_suit() -> None:
    assert even_ranks(Fraction(4, 5), 1024, 16) == (204, 205)
    assert even_ranks(Fraction(9, 10), 1000, 16) == (100, 100)  # in floats 99 and 100
    text = ratio_problem(Fraction(1, 2), 192, 4)
    assert text is not None and "give a ratio from 0.72 to 0.99, or --bits 16" in text
    text = ratio_problem(Fraction(999, 1000), 192, 4)
    assert text is not None and "give a ratio from 0.72 to 0.99" in text and "or" not in text[-9:]


def test_round_trip_is_exact_and_stable(file: Path) -> None:
    first = file.read_bytes()
    again = Bases.load(file, MODEL, weights="0" * 64)
    assert again.header == header() and again.ratio == Fraction(4, 5) and again.layers == (0, 1, 2)
    for layer, ranks in enumerate(RANKS):
        assert again.ranks(layer) == ranks
        for side in SIDES:
            found, expected = again.factor(layer, side), bases().factor(layer, side)
            for part, tensor in vars(expected).items():
                assert torch.equal(getattr(found, part), tensor)
    again.save(file)
    assert file.read_bytes() == first


def test_ranks_have_factors_of_their_own(shared: Path) -> None:
    first = shared.read_bytes()
    again = Bases.load(shared, MODEL)
    assert again.header.tensor_parallel == 2 and again.header.features == 8
    for layer, side, shard in product(range(3), SIDES, range(2)):
        found, expected = (one.factor(layer, side, shard) for one in (again, bases(2)))
        for part, tensor in vars(expected).items():
            assert torch.equal(getattr(found, part), tensor)
    again.save(shared)
    assert shared.read_bytes() == first


def test_files_for_one_rank_do_not_say_so(edit: Callable[..., Path]) -> None:
    """Those from before there were ranks stay valid, and none is taken for another's."""
    assert "tensor_parallel" not in json.loads(header().text())
    for ranks, message in (
        (2, "12 bytes a token, ratio says 6.4"),
        (3, "2 KV heads of a layer cannot be split evenly over 3 ranks"),
    ):
        path = edit(lambda content, _, ranks=ranks: content.update(tensor_parallel=ranks))
        with pytest.raises(CompressError, match=message):
            Bases.load(path, MODEL)


@given(st.integers(1, 300), st.integers(1, 300))
def test_heads_are_split_evenly_or_not_at_all(kv_heads: int, ranks: int) -> None:
    problem = split_problem(kv_heads, ranks)
    assert (problem is None) is (kv_heads % ranks == 0)
    if problem:
        allowed = problem.partition("allowed: ")[2].split(", ")
        assert allowed[0] == "1" and allowed[-1] == str(kv_heads)
        assert not any(kv_heads % int(count) for count in allowed)


def test_a_byte_that_changes_anywhere_is_refused(file: Path) -> None:
    whole, random = file.read_bytes(), Random(0)
    end = 8 + int.from_bytes(whole[:8], "little")
    for at in random.sample(range(len(whole)), 600):
        byte = whole[at]
        flipped = byte ^ 1 << random.randrange(8)
        if at < end and bytes((byte, flipped)).isspace():
            continue  # of JSON; says nothing
        file.write_bytes(whole[:at] + bytes([flipped]) + whole[at + 1 :])
        with pytest.raises(CompressError, match="vllm-compress calibrate-kv MODEL"):
            Bases.load(file)


def test_factors_of_others_are_refused(edit: Callable[..., Path]) -> None:
    path = edit(lambda _, tensors: tensors["layers.1.key.mean"].add_(1))
    with pytest.raises(CompressError, match="was changed after it was written"):
        Bases.load(path, MODEL)


def test_those_who_serve_may_read_it(file: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_another_model_is_refused_with_every_difference(file: Path) -> None:
    assert Bases.load(file, fingerprint(name="/models/tiny")).layers == (0, 1, 2)
    other = fingerprint(num_hidden_layers=8, head_dim=32, name="big")
    with pytest.raises(CompressError) as caught:
        Bases.load(file, other)
    text = str(caught.value)
    assert "2 problems" in text and "num_hidden_layers is 3" in text and "head_dim is 8" in text
    assert "is made for tiny, not for big" in text and "vllm-compress calibrate-kv big" in text
    with pytest.raises(CompressError) as caught:
        Bases.load(file, MODEL, layers=[1, 2, 4], weights="1" * 64)
    text = str(caught.value)
    assert "2 problems" in text and "has layers 0-2, the engine compresses 1-2, 4" in text
    assert "a fine-tune?" in text


def test_all_that_is_wrong_with_tensors_is_listed(edit: Callable[..., Path]) -> None:
    def change(_: dict, tensors: dict) -> None:
        del tensors["layers.0.key.mean"]
        tensors["layers.7.key.mean"] = torch.zeros(1)
        tensors["layers.1.value.encode"] = torch.zeros(16, 2)
        tensors["layers.1.value.mean"] = torch.zeros(16, dtype=torch.float16)
        tensors["layers.2.key.encode"][3, 1] = torch.nan
        tensors["layers.2.key.mean"][0] = torch.inf

    with pytest.raises(CompressError) as caught:
        Bases.load(edit(change), MODEL)
    text = str(caught.value)
    assert "6 problems" in text and text.count("vllm-compress calibrate-kv tiny") == 6
    assert "lacks 1 tensors: layers.0.key.mean;" in text
    assert "has 1 tensors: layers.7.key.mean, which its header does not name" in text
    assert "has layers.1.value.encode as float32 [16, 2], its header says float32 [16, 1]" in text
    assert "has layers.1.value.mean as float16 [16]" in text
    assert "has NaN or infinity in layers.2.key.encode" in text
    assert "has NaN or infinity in layers.2.key.mean" in text


def test_all_that_is_wrong_with_the_header_is_listed(edit: Callable[..., Path]) -> None:
    def change(content: dict, _: dict) -> None:
        content["ratioo"] = 1
        content["objective"] = "beauty"
        del content["calibration"]["samples"]

    with pytest.raises(CompressError) as caught:
        Bases.load(edit(change))
    text = str(caught.value)
    assert "3 problems" in text and "did you mean 'ratio'" in text and "objective" in text
    assert "calibration: 'samples' is missing" in text
    assert text.count("vllm-compress calibrate-kv MODEL") == 3


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([(0, 3, 3), (0, 3, 3)], "not ascending"),
        ([(1, 3, 3), (3, 3, 3)], "layer 3 is beyond"),
        ([(0, 3, 4), (1, 5, 4)], "16 bytes a token, ratio says 12.8"),
        ([(0, 2, 2)], "8 bytes a token, ratio says 12.8"),
        ([(0, 17, 1)], "layer 0 exceeds 16 features"),
        ([], "at least 1 item"),
    ],
)
def test_inconsistent_headers(ranks: list[tuple[int, int, int]], message: str) -> None:
    rows = [
        Layer(layer=i, key_rank=k, value_rank=v, key_error=0, value_error=0) for i, k, v in ranks
    ]
    with pytest.raises(ValueError, match=message):
        header(layers=rows)


def test_files_that_are_no_bases(file: Path, edit: Callable[..., Path], tmp_path: Path) -> None:
    whole = file.read_bytes()

    def refused(path: Path, message: str) -> None:
        with pytest.raises(CompressError, match=message) as caught:
            Bases.load(path)
        assert "vllm-compress calibrate-kv MODEL" in str(caught.value)

    refused(tmp_path / "missing", "cannot read")
    refused(tmp_path, "cannot read")
    for content in (whole[:-8], whole[:100], b"", b"{}"):
        file.write_bytes(content)
        refused(file, "damaged, cut short or not safetensors")
    for metadata in (None, {"vllm-compress": "{"}, {"vllm-compress": "[]"}):
        save_file({"a": torch.zeros(1)}, file, metadata)
        refused(file, "not a KV bases file")
    file.write_bytes(whole)
    refused(
        edit(lambda content, _: content.update(version=2)),
        "has version 2, this plugin reads version 3",
    )
