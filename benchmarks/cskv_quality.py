# SPDX-License-Identifier: Apache-2.0
"""What latents of several sizes and bits recall and lose, in several wordings of a key."""

from statistics import fmean

from benchmarks.common import Options, Result
from benchmarks.engine import in_process
from benchmarks.kv_engine import BLOCK, computed_dtype, contender
from benchmarks.kv_prompts import WORDINGS, Sizes, material
from benchmarks.kv_quality_recall import Measure, record
from kv_policies.latents.bases import Bases
from kv_policies.latents.format import LatentFormat
from vllm_plugin.demo_model import demo_model_path

QUALITY = ("nats", "passkey", *WORDINGS)
# Prefix of keys, contender, share of the bytes.
ROWS = (
    ("cskv", "cskv", 0.14),
    ("cskv_020", "cskv", 0.20),
    ("cskv_16bit_020", "cskv_16bit", 0.20),
    ("cskv_006", "cskv", 0.06),
)
SIZES = Sizes(
    lengths=(300, 700),
    depths=(0.2, 0.8),
    needle_lengths=(),
    prompts=1,
    windows=8,
    wordings=tuple(WORDINGS),
)
SMOKE_SIZES = Sizes((160,), (0.5,), (), 2, 1, 2, 160, 8, ("record",))


def quality(options: Options, result: Result) -> None:
    """Fill cskv_nats and cskv_WORDING, and the same for other sizes and bits."""
    model, sizes = demo_model_path(), SMOKE_SIZES if options.smoke else SIZES
    given = in_process(material, model, sizes, options.seed, preloaded=options.smoke)
    given.questions.pop("needles")
    dtype = in_process(computed_dtype, preloaded=options.smoke)
    result.note("quality_dtype", dtype)
    measure = Measure(model, given, sizes, options, result, dtype)
    full = measure.full()
    for prefix, name, share in ROWS[:1] if options.smoke else ROWS:
        arguments = contender(name, share, model, options)
        file = arguments["additional_config"]["compress"]["kv"]["bases"]
        taken = in_process(_share, file, preloaded=options.smoke)
        result.put(f"{prefix}_share", taken["share"], **taken)
        record(result, prefix, measure(prefix, arguments), full)


def _share(file: str) -> dict[str, float]:
    """Blocks of 32 tokens that a token takes, times 32, and ranks: means over layers."""
    bases = Bases.load(file)
    ranks = [bases.ranks(layer) for layer in bases.layers]
    elements = BLOCK * 2 * bases.header.features
    tokens = [LatentFormat.most_tokens(elements, *both, bases.bits) for both in ranks]
    keys, values = zip(*ranks, strict=True)
    return {
        "share": fmean(BLOCK / each for each in tokens),
        "key_rank": fmean(keys),
        "value_rank": fmean(values),
    }
