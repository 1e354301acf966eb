# SPDX-License-Identifier: Apache-2.0
"""``--quantization METHOD``, for 16-bit checkpoints and those we wrote."""

from typing import TYPE_CHECKING, Any, ClassVar

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
    CompressedTensorsWNA16,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from compress_common.errors import CompressError
from quant_methods.base import Capabilities, QuantMethod
from quant_methods.formats.checkpoint_formats import (
    EMBEDDING_TARGETS,
    compressed_tensors_config,
    quantized_problem,
    written_by,
)
from quant_methods.grid import Grid
from quant_methods.registry import served_methods
from vllm_plugin.quantization.cpu_experts import CompressedTensorsCpuExperts
from vllm_plugin.quantization.cpu_int4 import SETTING, Activations, resolve_activations
from vllm_plugin.quantization.embedding import QuantizedEmbedding
from vllm_plugin.quantization.scheme import Int4Scheme

if TYPE_CHECKING:
    from vllm_plugin.quantization.reload import Source


class MethodConfig(CompressedTensorsConfig):
    """The config of compressed-tensors under the name of a method. Each method has a subclass.

    For a 16-bit checkpoint vLLM builds it without arguments, and the config edge calls ``describe``
    with the grids that the loader will quantize to. For a checkpoint that ``vllm-compress
    quantize`` wrote, vLLM builds it from config.json.
    """

    method: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    def __init__(
        self,
        target_scheme_map: dict[str, Any] | None = None,
        ignore: list[str] | None = None,
        quant_format: str = "pack-quantized",
        **kwargs: Any,
    ) -> None:
        super().__init__(target_scheme_map or {}, ignore or [], quant_format, **kwargs)
        self.activations: Activations = "auto"
        self.source: Source | None = None  # what the loader quantized; None: nothing yet

    def get_name(self) -> str:  # type: ignore[override]
        return self.method

    @property
    def quantizes_at_load(self) -> bool:
        """Whether the loader quantizes a 16-bit checkpoint."""
        return self.config is None

    def describe(
        self, grids: dict[str, Grid], hf_config: Any, embedding: Grid | None = None
    ) -> None:
        """Set the scheme of each linear that the loader will quantize.

        Args:
            grids: ``{linear: grid}`` by full name. The others stay at 16 bits.
            hf_config: the text model's ``transformers`` config.
            embedding: of the token embedding and lm_head; None: they stay at 16 bits.
        """
        marker = {"method": self.method}
        config = compressed_tensors_config(grids, hf_config, marker, embedding)
        self.target_scheme_map = self._quantization_scheme_map_from_config(config)
        self.ignore = config["ignore"]
        self.quant_format = config["format"]

    @property
    def embedding_weights(self) -> Any | None:
        """How the token embedding and lm_head are quantized; None: they are not."""
        return self.target_scheme_map.get(EMBEDDING_TARGETS[0], {}).get("weights")

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        # By type, not by name: vLLM's Llama gives its embedding no name.
        weights = self.embedding_weights
        if weights is not None and isinstance(layer, VocabParallelEmbedding):
            return QuantizedEmbedding(weights)
        if isinstance(layer, RoutedExperts) and current_platform.is_cpu():
            return self._cpu_experts(layer, prefix)
        return super().get_quant_method(layer, prefix)

    def _cpu_experts(self, layer: RoutedExperts, prefix: str) -> Any:
        """Return what serves routed experts on a CPU: vLLM's kernel for AMX, or ours."""
        self._add_fused_moe_to_target_scheme_map()
        scheme = self.get_scheme_dict(layer, f"{prefix}.0.{layer.ckpt_gate_proj_name}")
        if scheme is None or scheme["input_activations"] is not None:
            return super().get_quant_method(layer, prefix)
        if resolve_activations(self.activations) == "int8":
            # It does not take zero points, groups of 32 and some ways to route.
            try:
                return super().get_quant_method(layer, prefix)
            except NotImplementedError as error:
                if self.activations == "int8":  # asked for, not chosen
                    raise CompressError(
                        f"{SETTING} is 'int8', and vLLM's kernel does not take these experts: "
                        f"{error}; use 'auto' or 'bf16'"
                    ) from error
        return CompressedTensorsCpuExperts(scheme["weights"], layer.moe_config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim our own checkpoints, which carry a marker, unless the user names another method."""
        if written_by(hf_quant_cfg) == cls.method and user_quant in (None, cls.method):
            return cls.method
        if user_quant == cls.method and (problem := quantized_problem(hf_quant_cfg, cls.method)):
            raise CompressError(problem)
        return None

    def _get_scheme_from_parts(self, *args: Any, **kwargs: Any) -> CompressedTensorsScheme:
        scheme = super()._get_scheme_from_parts(*args, **kwargs)
        if type(scheme) is not CompressedTensorsWNA16:
            return scheme
        return Int4Scheme(
            activations=self.activations,
            strategy=scheme.strategy,
            num_bits=scheme.num_bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            layer_name=scheme.layer_name,
        )

    def get_scheme(self, layer: Any, layer_name: str | None = None) -> Any:
        if not self.target_scheme_map:
            raise CompressError(
                "the engine was not configured through EngineArgs.create_engine_config, so the "
                f"settings of --quantization {self.method} are unknown; use LLM, vllm serve or "
                "EngineArgs"
            )
        return super().get_scheme(layer, layer_name)


def _config_class(kind: type[QuantMethod]) -> type[MethodConfig]:
    """Return the config class of a method. vLLM pickles it by name, so this module must have it."""
    name = f"Config_{kind.name}"  # no two methods share it, and nothing else here starts so
    members = {
        "method": kind.name,
        "capabilities": kind.capabilities,
        "__doc__": MethodConfig.__doc__,
        "__module__": __name__,
    }
    globals()[name] = made = type(name, (MethodConfig,), members)
    return made


CONFIGS = tuple(_config_class(kind) for kind in served_methods())
