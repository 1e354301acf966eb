# SPDX-License-Identifier: Apache-2.0
"""A language model inside another model, of images for one: its config, and what lies beside it.

``language_config`` is the one view of a config. Whoever asks what a language model is like gets the
config from it: the command line, the config edge, the loader and the worker.

``transformers`` takes seconds to import. It is imported where a class of it is needed.
"""

import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress_common.errors import CompressError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Ends of the names of classes with a language-model head, as vLLM knows them.
_GENERATING = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "ChatModel")
# What the config of a whole model tells, and that of its language model need not.
_OF_THE_WHOLE = ("dtype", "tie_word_embeddings", "quantization_config", "_commit_hash")


def language_config(config: Any) -> Any:
    """Return the config of the language model that a model has inside, or is.

    Args:
        config: The ``transformers`` config of the whole model. It is not changed.

    Returns:
        ``config`` itself for a language model. Otherwise a copy of the part for text, with what
        only the whole tells, and with the whole config as ``wrapper``.
    """
    text = config.get_text_config()
    if text is config:
        return config
    text = copy.copy(text)
    text.wrapper = config
    for name in _OF_THE_WHOLE:
        if (value := getattr(config, name, None)) is not None:
            setattr(text, name, value)
    return text


def generates(config: Any) -> bool:
    """Whether a model gives logits of next tokens, by the class that its config names.

    Args:
        config: As ``language_config`` returns it.

    Returns:
        True also where the config names no class.
    """
    named = getattr(getattr(config, "wrapper", config), "architectures", None) or ()
    return not named or named[0].endswith(_GENERATING)


def towers_of(whole: Any, body: type[nn.Module]) -> tuple[str, ...]:
    """Return the names of the modules that a model has beside its language model.

    Args:
        whole: The ``transformers`` config of the whole model.
        body: Class of the language model without its head.

    Returns:
        The names without those of their parents, such as ``visual`` or ``multi_modal_projector``.
        ``transformers``, checkpoints and vLLM agree on them.

    Raises:
        CompressError: ``transformers`` has no such model, or not one language model in it.
    """
    from transformers import AutoModelForImageTextToText

    whole = copy.deepcopy(whole)
    if getattr(whole, "quantization_config", None) is not None:
        del whole.quantization_config
    kind = f"the model around it, of model_type {whole.model_type!r}, is not supported"
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(whole, trust_remote_code=False)
    except Exception as error:  # anything that a model's own code can raise
        reason = str(error).strip().splitlines()[0][:200]
        raise CompressError(
            f"{kind}: transformers cannot build a model of images and text of its config ({reason})"
        ) from error
    found = [name for name, module in model.named_modules() if type(module) is body]
    if len(found) != 1:
        raise CompressError(f"{kind}: it has {len(found)} language models of {body.__name__}")
    towers, above = [], found[0]
    while above:
        inside = above.rpartition(".")[2]
        above = above.rpartition(".")[0]
        towers += [
            name
            for name, module in model.get_submodule(above).named_children()
            if name not in (inside, "lm_head") and any(True for _ in module.parameters())
        ]
    return tuple(dict.fromkeys(towers))


def decoder_class(config: Any) -> "type[PreTrainedModel]":
    """Return the ``transformers`` class of a language model.

    Where there is only one without a head, because another model has the head, the class is made.

    Args:
        config: As ``language_config`` returns it.

    Raises:
        CompressError: There is none.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_MAPPING,
    )

    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise CompressError(
            "it is an encoder, which predicts masked tokens as BERT does, and only decoders are "
            "quantized; serve it at 16 bits"
        )
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # type: ignore[no-any-return]
    if type(config) not in MODEL_MAPPING or not hasattr(config, "wrapper"):
        raise CompressError(
            f"transformers has no language model for {type(config).__name__}; int4 needs the "
            "Hugging Face config (--config-format hf)"
        )
    return _with_head(MODEL_MAPPING[type(config)])


@lru_cache
def _with_head(body: "type[PreTrainedModel]") -> "type[PreTrainedModel]":
    """Return a class that adds a head to a language model without one."""
    from transformers import GenerationMixin, PreTrainedModel

    # Of the body's own base class, which tells what attention the model supports.
    base = next(kind for kind in body.__mro__[1:] if issubclass(kind, PreTrainedModel))
    return type(f"{body.__name__}WithHead", (_Head, GenerationMixin, base), {"_body": body})


class _Head:
    """What ``_with_head`` adds: a head, tied or not.

    Annotations name only what this module has imported: ``transformers`` evaluates them.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _body: type[nn.Module]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model = self._body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the logits of every token: see ``LlamaForCausalLM`` for the arguments."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(out.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)
