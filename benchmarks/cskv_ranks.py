# SPDX-License-Identifier: Apache-2.0
"""What tensor parallelism costs latents: the KV heads of each rank have bases of their own."""

from fractions import Fraction
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.common import Options, Result, cache_folder
from benchmarks.cskv_quality import SIZES, SMOKE_SIZES
from benchmarks.engine import in_process
from benchmarks.kv_engine import bases, computed_dtype, policy
from benchmarks.kv_prompts import WORDINGS, material
from benchmarks.kv_quality_recall import Measure, record
from kv_policies.latents.bases import Bases
from kv_policies.latents.bases_header import SIDES, Header
from kv_policies.latents.format import Bits
from kv_policies.latents.low_rank import Factor
from vllm_plugin.demo_model import demo_model_path

RANKS = (1, 3)  # the demo model has 3 KV heads
RATIOS: dict[Bits, Fraction] = {16: Fraction(4, 5), 4: Fraction(43, 50)}
SERVED: Bits = 16  # in 4 bits the values of a token have one scale per rank, so ranks matter
MEASURES = ("nats", "passkey", *WORDINGS)


def ranks(options: Options, result: Result) -> None:
    """Fill tpN_BITSbit_key_error, tpN_BITSbit_value_error, and nats and recall of 16 bits."""
    model, sizes = demo_model_path(), SMOKE_SIZES if options.smoke else SIZES
    files: dict[int, Path] = {}
    for count in RANKS:
        split = () if count == 1 else ("--tensor-parallel-size", str(count))
        for bits, ratio in RATIOS.items():
            if options.smoke and bits != SERVED:
                continue
            file = bases(model, ratio, bits, *split)
            header = in_process(_header, file, preloaded=options.smoke)
            for side in SIDES:
                errors = [getattr(row, f"{side}_error") for row in header.layers]
                result.put(f"tp{count}_{bits}bit_{side}_error", fmean(errors))
            if bits == SERVED:
                files[count] = file
    given = in_process(material, model, sizes, options.seed, preloaded=options.smoke)
    given.questions.pop("needles")
    dtype = in_process(computed_dtype, preloaded=options.smoke)
    measure = Measure(model, given, sizes, options, result, dtype)
    full = measure.full()
    for count, file in files.items():
        served = cache_folder() / f"{file.stem}-as-one-rank.safetensors"
        in_process(_save_as_one_rank, file, served, preloaded=options.smoke)
        prefix = f"tp{count}_{SERVED}bit"
        record(result, prefix, measure(prefix, policy("cskv", bases=str(served))), full)


def as_one_rank(split: Bases) -> Bases:
    """Return bases for one rank, of block-diagonal factors.

    In 16 bits they keep exactly what those of several ranks do, in as many bytes.
    """
    count = split.header.tensor_parallel
    factors = {
        (layer, side): _side_by_side([split.factor(layer, side, shard) for shard in range(count)])
        for layer in split.layers
        for side in SIDES
    }
    rows = tuple(
        row.model_copy(
            update={"key_rank": count * row.key_rank, "value_rank": count * row.value_rank}
        )
        for row in split.header.layers
    )
    header = split.header.model_copy(update={"tensor_parallel": 1, "layers": rows})
    return Bases(header, [factors])


def _side_by_side(factors: list[Factor]) -> Factor:
    return Factor(
        torch.block_diag(*(factor.encode for factor in factors)),
        torch.block_diag(*(factor.decode for factor in factors)),
        torch.cat([factor.mean for factor in factors]),
    )


def _save_as_one_rank(file: Path, target: Path) -> None:
    as_one_rank(Bases.load(file)).save(target)


def _header(file: Path) -> Header:
    return Bases.load(file).header
