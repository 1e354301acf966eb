# SPDX-License-Identifier: Apache-2.0
"""Which modules of a supported decoder feed which: the map that smoothing folds along.

Names are Hugging Face's, relative to a decoder layer. Models outside the table are refused:
a fold along a wrong edge would corrupt the model without an error.
"""

from dataclasses import dataclass
from typing import Any

from compress_common.errors import joined

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
O_PROJ = "self_attn.o_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"
LINEARS = (*QKV, O_PROJ, *GATE_UP, DOWN)
# vLLM fuses the linears of a unit into one, so they are quantized together or not at all.
UNITS = (QKV, (O_PROJ,), GATE_UP, (DOWN,))
# Cut along input channels under tensor parallelism; the others along output channels.
ROW_PARALLEL = (O_PROJ, DOWN)


@dataclass(frozen=True)
class Fold:
    """One smoothing vector: the consumers share an input that ``producer`` writes.

    ``producer`` is a norm (its weight is divided by the vector) or a linear (its output rows
    are). ``repeat`` > 1 is grouped-query attention: each channel of the producer feeds that many
    query heads of ``head_dim`` channels.
    """

    key: str
    producer: str
    consumers: tuple[str, ...]
    repeat: int = 1
    head_dim: int = 1

    @property
    def from_norm(self) -> bool:
        return self.producer.endswith("norm")


@dataclass(frozen=True)
class Architecture:
    """A decoder family: its two norms that feed linears, and the constant added to their weight."""

    attn_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    norm_offset: float = 0.0
    layers_prefix: str = "model.layers"

    def folds(self, config: Any) -> tuple[Fold, ...]:
        """The four folds of each decoder layer: two out of norms, two out of linears."""
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return (
            Fold("attn_norm", self.attn_norm, QKV),
            Fold("v_proj", QKV[2], (O_PROJ,), repeat=heads // kv_heads, head_dim=head_dim),
            Fold("mlp_norm", self.mlp_norm, GATE_UP),
            Fold("up_proj", GATE_UP[1], (DOWN,)),
        )

    def first_sharing(self, config: Any) -> dict[str, str]:
        """Each linear of a layer -> the first of those that share its input: watch that one."""
        return {c: fold.consumers[0] for fold in self.folds(config) for c in fold.consumers}


_GEMMA = Architecture(norm_offset=1.0)
_GEMMA_SANDWICH = Architecture(mlp_norm="pre_feedforward_layernorm", norm_offset=1.0)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "gemma": _GEMMA,
    "gemma2": _GEMMA_SANDWICH,
    "gemma3_text": _GEMMA_SANDWICH,
}


def architecture_of(config: Any) -> Architecture:
    """The entry for a Hugging Face config; CompressError lists everything that is in the way."""
    problems = []
    kind = str(getattr(config, "model_type", None))
    if kind not in ARCHITECTURES:
        problems.append(
            f"model_type {kind!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    if getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        problems.append("mixture-of-experts layers are not supported: routers share the norm")
    if getattr(config, "quantization_config", None):
        method = dict(config.quantization_config).get("quant_method", "unknown")
        problems.append(
            f"the checkpoint is already quantised ({method}); give the original 16-bit one"
        )
    if problems:
        raise joined(problems)
    return ARCHITECTURES[kind]


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """``{linear: (out_features, in_features)}`` of one decoder layer, from the config alone."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return dict(zip(LINEARS, shapes, strict=True))
