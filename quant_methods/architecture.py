# SPDX-License-Identifier: Apache-2.0
"""The supported decoders, and which of their modules feed which.

Smoothing folds along these edges. Names are Hugging Face's, relative to a decoder layer. Models
outside the table are refused, because a fold along a wrong edge corrupts a model without an error.
"""

from dataclasses import dataclass, replace
from typing import Any

from compress_common.errors import joined

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
O_PROJ = "self_attn.o_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"
LINEARS = (*QKV, O_PROJ, *GATE_UP, DOWN)
# Tensor parallelism cuts these along input channels, and the others along output channels.
ROW_PARALLEL = (O_PROJ, DOWN)
EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"  # of its own only where it is not tied to the embedding
EMBEDDINGS = (EMBEDDING, HEAD)


@dataclass(frozen=True)
class Unit:
    """Linears that vLLM fuses into one. They have one grid, or all stay at 16 bits.

    Attributes:
        name: Short name of the unit, unique in a decoder layer.
        linears: Its linears, relative to the layer.
    """

    name: str
    linears: tuple[str, ...]


UNITS = (
    Unit("qkv", QKV),
    Unit("o", (O_PROJ,)),
    Unit("gate_up", GATE_UP),
    Unit("down", (DOWN,)),
)


@dataclass(frozen=True)
class Fold:
    """One smoothing vector: several linears read what one module writes.

    Attributes:
        key: Name of the fold in a decoder layer.
        producer: The norm whose weight, or the linear whose output rows, the vector divides.
        consumers: The linears whose input channels the vector multiplies.
        repeat: Query heads that each channel of the producer feeds; above 1 with grouped queries.
        head_dim: Channels of a head.
    """

    key: str
    producer: str
    consumers: tuple[str, ...]
    repeat: int = 1
    head_dim: int = 1

    @property
    def from_norm(self) -> bool:
        """Whether the producer is a norm."""
        return self.producer.endswith("norm")


@dataclass(frozen=True)
class Architecture:
    """A family of decoders.

    Attributes:
        attn_norm: The norm in front of q, k and v.
        mlp_norm: The norm in front of gate and up.
        norm_offset: What a norm adds to its stored weight: 1 for Gemma.
        layers_prefix: Name of the list of decoder layers.
        qk_norms: Whether queries and keys are normalized in front of RoPE.
        embeddings: Whether vLLM's model lets a quantization method make its embedding.
    """

    attn_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    norm_offset: float = 0.0
    layers_prefix: str = "model.layers"
    qk_norms: bool = False
    embeddings: bool = True

    @property
    def sandwich_norms(self) -> bool:
        """Whether norms also follow attention and MLP, as in Gemma 2 and 3."""
        return self.mlp_norm == "pre_feedforward_layernorm"

    def folds(self, config: Any) -> tuple[Fold, ...]:
        """Return the folds of a decoder layer: two out of norms, two out of linears."""
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = head_dim_of(config)
        return (
            Fold("attn_norm", self.attn_norm, QKV),
            Fold("v_proj", QKV[2], (O_PROJ,), repeat=heads // kv_heads, head_dim=head_dim),
            Fold("mlp_norm", self.mlp_norm, GATE_UP),
            Fold("up_proj", GATE_UP[1], (DOWN,)),
        )

    def units(self, config: Any) -> dict[str, tuple[str, ...]]:
        """Return ``{unit: linears}`` of all layers, by full name: ``model.layers.3.gate_up``."""
        return {
            f"{self.layers_prefix}.{index}.{unit.name}": tuple(
                f"{self.layers_prefix}.{index}.{linear}" for linear in unit.linears
            )
            for index in range(config.num_hidden_layers)
            for unit in UNITS
        }

    def first_sharing(self, config: Any) -> dict[str, str]:
        """Return ``{linear: the first linear with the same input}``. Only that one is observed."""
        return {c: fold.consumers[0] for fold in self.folds(config) for c in fold.consumers}


_GEMMA = Architecture(norm_offset=1.0, embeddings=False)
_GEMMA_SANDWICH = Architecture(mlp_norm="pre_feedforward_layernorm", norm_offset=1.0)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(qk_norms=True),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA_SANDWICH, embeddings=False),
    "gemma3_text": replace(_GEMMA_SANDWICH, qk_norms=True),
}


def architecture_of(config: Any) -> Architecture:
    """Return the family of a model.

    Args:
        config: The text model's ``transformers`` config.

    Raises:
        CompressError: Lists everything that keeps the model from being quantized.
    """
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
            f"the checkpoint is already quantized ({method}); give the original 16-bit one"
        )
    if problems:
        raise joined(problems)
    return ARCHITECTURES[kind]


def head_dim_of(config: Any) -> int:
    """Return the channels of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def split_units(units: dict[str, tuple[str, ...]], grids: dict[str, Any]) -> list[str]:
    """Return the units whose linears do not share one grid, which vLLM cannot load.

    Args:
        units: ``{unit: linears}``, as ``Architecture.units`` returns it.
        grids: ``{linear: grid}`` by full name. A linear without one stays at 16 bits.
    """
    return [u for u, linears in units.items() if len({grids.get(name) for name in linears}) > 1]


def linear_shapes(config: Any) -> dict[str, tuple[int, int]]:
    """Return ``{linear: (out_features, in_features)}`` of a decoder layer, from its config."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = head_dim_of(config)
    q, kv = heads * head_dim, kv_heads * head_dim
    shapes = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    return dict(zip(LINEARS, shapes, strict=True))
