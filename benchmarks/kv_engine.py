# SPDX-License-Identifier: Apache-2.0
"""What both KV benchmarks serve: the full cache, an fp8 cache, and each policy at some keep share.

One that cannot start does not end a benchmark: its keys are null, and say why.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import ROOT, Options, cache_folder
from benchmarks.engine import Engine, EngineFailed, in_process
from benchmarks.random_models import TINY, random_llama
from benchmarks.texts import opticks
from kv_policies.budget.share import exact
from vllm_plugin.demo_model import demo_model_path

if TYPE_CHECKING:
    from kv_policies.latents.bases_header import Side
    from kv_policies.latents.format import Bits
    from kv_policies.latents.low_rank import Factor

BLOCK = 32  # tokens, for all contenders: vLLM's own default for CPUs is 128
POLICIES = ("prefix_kv", "snap_kv", "key_diff", "recent", "cskv", "fp8")
# Its variants, by what they change.
PREFIX_KV: dict[str, dict[str, int]] = {
    "prefix_kv": {},
    "prefix_kv_unpooled": {"pool": 1},
    "prefix_kv_all_queries": {"pool": 1, "queries": 0},
}
FORCED_TOKENS = "vllm_plugin.commands.judging.forced_tokens:ForcedTokens"
_MOST_IN_4_BITS = 0.28  # of the cache's bytes: all numbers of the demo model
_REVISION = 5  # raise it when profiles are made differently


class KVEngine(Engine):
    """An engine that answers what the KV benchmarks ask."""

    child = "benchmarks.kv_child:KVChild"


class NotMeasured(RuntimeError):
    """A figure that cannot be had here; the text says why."""


@dataclass(frozen=True)
class Shape:
    """What a model's KV cache is made of, per layer and token."""

    layers: int
    token_bytes: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of all layers, 16-bit."""
        return self.layers * self.token_bytes * BLOCK


def bench_model(options: Options) -> Path:
    """The demo model; a random one of two layers for --smoke."""
    return random_llama(TINY, options) if options.smoke else demo_model_path()


def shape_of(model: Path) -> Shape:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return Shape(config["num_hidden_layers"], 2 * kv_heads * head_dim * 2)


def policy(name: str, **settings: Any) -> dict[str, Any]:
    """The engine arguments of a policy of the plugin."""
    return {"additional_config": {"compress": {"kv": {"policy": name, **settings}}}}


def contender(name: str, keep: float, model: Path, options: Options) -> dict[str, Any]:
    """The engine arguments of ``full``, ``fp8``, a policy with its defaults, or ``snap_kv_fp8``.

    ``prefix_kv`` has a profile, made here if there is none yet; ``prefix_kv_unpooled`` does not
    pool its scores, ``prefix_kv_all_queries`` lets all queries vote too, as in the paper.
    ``snap_kv_profile`` is snap_kv with the sizes of that profile. ``cskv`` has bases, made here
    too, of ratio 1 - keep, in 4 bits where these can use so many bytes, else in 16; ``cskv_16bit``
    in 16; ``cskv_halves`` in 16 and with as many latents for keys as for values in every layer.
    """
    if name == "full":
        return {"plugin": False}
    if name == "fp8":
        return {"plugin": False, "kv_cache_dtype": "fp8"}
    if name == "snap_kv_fp8":
        return policy("snap_kv", keep=keep) | {"kv_cache_dtype": "fp8"}
    if name in PREFIX_KV:
        return policy("prefix_kv", profile=str(profile(model, keep, options)), **PREFIX_KV[name])
    if name == "snap_kv_profile":
        return policy("snap_kv", profile=str(profile(model, keep, options)))
    if name in ("cskv", "cskv_16bit", "cskv_halves"):
        even = ("--no-allocate",) if name == "cskv_halves" else ()
        bits = 4 if name == "cskv" and keep <= _MOST_IN_4_BITS else 16
        return policy("cskv", bases=str(bases(model, 1 - exact(keep), bits, *even)))
    return policy(name, keep=keep)


def profile(model: Path, keep: float, options: Options) -> Path:
    """The profile that ``vllm-compress profile`` makes, kept in the cache; --smoke invents one.

    From the first half of Opticks: minutes faster than text that the model samples.
    """
    if options.smoke:
        return made_up_profile(model, keep, 2, options)
    text = ("--samples", "10", "--length", "1024")
    return _made("profile", model, "json", "--keep", str(keep), *text)


def bases(model: Path, ratio: Fraction, bits: int, *options: str) -> Path:
    """The bases that ``vllm-compress calibrate-kv`` makes of the same text, kept in the cache."""
    size = ("--ratio", str(float(ratio)), "--bits", str(bits))
    return _made("calibrate-kv", model, "safetensors", *size, *options)


def _made(command: str, model: Path, suffix: str, *options: str) -> Path:
    """What a command of ours makes of a model and the first half of Opticks."""
    digest = hashlib.sha256()
    for file in (model / "config.json", *sorted(model.glob("*.safetensors"))):
        digest.update(file.read_bytes())
    name = "".join(option.replace("--", "-") for option in options)
    target = cache_folder() / f"{command}-{digest.hexdigest()[:12]}{name}-r{_REVISION}.{suffix}"
    if not target.is_file():
        text = cache_folder() / "opticks-1.txt"
        text.write_text(opticks()[0], encoding="utf-8")
        write_with(command, target, str(model), *options, "--text", str(text))
    return target


def write_with(command: str, target: Path, *arguments: str) -> None:
    """Have a command of ours write a file. NotMeasured: it did not."""
    told = subprocess.run(
        [sys.executable, "-m", "vllm_plugin.cli", command, *arguments, "--out", str(target)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if told.returncode or not target.is_file():
        raise NotMeasured(f"vllm-compress {command}: {last_line(told.stdout)}")


def made_up_profile(model: Path, keep: float, levels: int, options: Options) -> Path:
    """A profile whose shares rise evenly from 0.4 to 1.6 times ``keep``, for figures of speed."""
    target = cache_folder() / f"made-up-{model.name}-{keep}-{levels}-r{_REVISION}.json"
    in_process(_make_up, model, keep, levels, target, preloaded=options.smoke)
    return target


def _make_up(model: Path, keep: float, levels: int, target: Path) -> None:
    from datetime import UTC, datetime

    from transformers import AutoConfig

    from kv_policies.budget.profile import Profile, Provenance
    from vllm_plugin.kv_fingerprint import fingerprint_of, full_attention_layers

    config = AutoConfig.from_pretrained(model)
    layers = full_attention_layers(config)
    spread = [Fraction(2 * i - len(layers) + 1, len(layers)) for i in range(len(layers))]
    mean = exact(keep)
    Profile(
        model=fingerprint_of(model.name, config),
        keep=mean,
        levels=levels,
        layers=layers,
        fractions=tuple(mean + mean * Fraction(3, 5) * one for one in spread),
        provenance=Provenance(
            tool_version="benchmarks",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            text="made up",
            samples=1,
            sample_tokens=1,
        ),
    ).save(target)


def save_made_up_bases(
    model: Path,
    ratio: Fraction,
    bits: "Bits",
    shards: "Sequence[Mapping[tuple[int, Side], Factor]]",
    target: Path,
) -> None:
    """Bases that fit ``model`` and come from no text.

    shards: factors by layer and side, of each rank of tensor parallelism.
    """
    from transformers import AutoConfig

    from compress_common.checkpoints.checkpoint import Checkpoint
    from kv_policies.latents.bases import Bases
    from kv_policies.latents.bases_header import Header, Layer
    from kv_policies.model_file import Calibration
    from vllm_plugin.kv_fingerprint import fingerprint_of, full_attention_layers, weights_digest

    config = AutoConfig.from_pretrained(model)
    fingerprint = fingerprint_of(model.name, config)
    digest = weights_digest(Checkpoint(model), "model.layers", fingerprint.num_hidden_layers)
    rows = tuple(
        Layer(
            layer=layer,
            key_rank=len(shards[0][layer, "key"].decode),
            value_rank=len(shards[0][layer, "value"].decode),
            key_error=0,
            value_error=0,
        )
        for layer in full_attention_layers(config)
    )
    made_up = Calibration(
        tool_version="benchmarks", created="never", text="none", samples=1, sample_tokens=1
    )
    header = Header(
        model=fingerprint,
        weights=digest,
        bits=bits,
        ratio=ratio,
        objective="reconstruction",
        tensor_parallel=len(shards),
        layers=rows,
        calibration=made_up,
    )
    Bases(header, shards).save(target)


def computed_dtype() -> str:
    """float32 where products in bfloat16 take ten times as long, and would hide all else."""
    from compress_common.calibration.precision import slow_in_16_bit

    return "float32" if slow_in_16_bit() else "bfloat16"


@contextmanager
def reported(failed: dict[str, str], name: str) -> Iterator[None]:
    """Note in ``failed`` why ``name`` could not be measured, and go on with the others."""
    try:
        yield
    except (EngineFailed, NotMeasured) as error:
        failed[name] = last_line(str(error))


def last_line(text: str) -> str:
    """The last line that names an error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if "Error" in line.partition(":")[0]]
    return (errors or lines)[-1][-400:]
