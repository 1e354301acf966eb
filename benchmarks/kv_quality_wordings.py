# SPDX-License-Identifier: Apache-2.0
"""Recall of a key in several wordings, for each policy: the mean and the worst wording."""

from statistics import fmean
from typing import Any

from tqdm import tqdm

from benchmarks.common import Options, Result
from benchmarks.engine import in_process
from benchmarks.kv_engine import computed_dtype, contender, policy, reported
from benchmarks.kv_prompts import WORDINGS, Sizes, material
from benchmarks.kv_quality_recall import Measure, record
from vllm_plugin.demo_model import demo_model_path

NAMES = ("passkey", *WORDINGS)
MEASURES = ("passkey_mean", "passkey_min", "text_nats")
# (Prefix of keys, contender, share that stays). What serves most first.
ROWS = (
    *(
        (f"{name}_025", name, 0.25)
        for name in (
            *("snap_kv", "key_diff", "h2o", "r_kv", "expected_attention", "prefix_kv"),
            *("prefix_kv_unpooled", "prefix_kv_all_queries", "recent", "snap_kv_profile"),
        )
    ),
    ("cskv_014", "cskv", 0.14),
    ("cskv_16bit_020", "cskv_16bit", 0.20),
    *(
        (f"{name}_{round(100 * keep):03}", name, keep)
        for keep in (0.50, 0.10)
        for name in ("snap_kv", "key_diff", "h2o", "r_kv", "expected_attention")
    ),
)
# A budget of a quarter of the longest prompts, and the same with prompts that are compacted while
# they are computed.
_BOUNDED: dict[str, Any] = {"budget": 256, "decode_window": 128}
BOUNDED = {
    f"{name}_{kind}": policy(name, **_BOUNDED, **more)
    for name in ("snap_kv", "h2o")
    for kind, more in (("256", {}), ("256_windowed", {"prompt_window": 384}))
}
SIZES = Sizes(
    lengths=(300, 700, 1200),
    depths=(0.1, 0.5, 0.9),
    needle_lengths=(),
    prompts=1,
    windows=6,
    wordings=tuple(WORDINGS),
)
SMOKE_SIZES = Sizes((160,), (0.5,), (), 2, 1, 2, 160, 8, ("record",))


def wordings(options: Options, result: Result) -> None:
    """Fill wordings, P_K_passkey_mean, P_K_passkey_min, P_K_text_nats and P_K_WORDING."""
    model, sizes = demo_model_path(), SMOKE_SIZES if options.smoke else SIZES
    given = in_process(material, model, sizes, options.seed, preloaded=options.smoke)
    given.questions.pop("needles")
    result.put("wordings", len(given.questions))
    dtype = in_process(computed_dtype, preloaded=options.smoke)
    result.note("wordings_dtype", dtype)
    seen = Result()  # the other part has the same names for prompts of other lengths
    measure = Measure(model, given, sizes, options, seen, dtype)
    full = measure.full()
    result.put("full_passkey_min", min(seen.values[f"full_{name}"] or 0 for name in full.recalled))
    every = [*ROWS, *((name, name, 0.0) for name in BOUNDED)]
    rows = [row for row in every if not options.rows or row[0] in options.rows]
    for prefix, name, share in (bar := tqdm(rows[:1] if options.smoke else rows, "wordings")):
        bar.set_postfix_str(prefix)
        failed: dict[str, str] = {}
        with reported(failed, prefix):
            arguments = BOUNDED.get(name) or contender(name, share, model, options)
            record(seen, prefix, measure(prefix, arguments), full)
            found = {one: seen.values[f"{prefix}_{one}"] or 0 for one in given.questions}
            result.put(f"{prefix}_passkey_mean", fmean(found.values()), **found)
            result.put(f"{prefix}_passkey_min", min(found.values()))
            nats = seen.values[f"{prefix}_nats"]
            assert nats is not None
            result.put(f"{prefix}_text_nats", nats, se=seen.values[f"{prefix}_nats_se"])
        for what in MEASURES if failed else ():
            result.missing(f"{prefix}_{what}", failed[prefix])
