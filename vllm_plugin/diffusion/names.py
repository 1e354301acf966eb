# SPDX-License-Identifier: Apache-2.0
"""What the config of a LLaDA calls itself. Imports nothing."""

from typing import Final

MODEL_TYPE: Final = "llada"
ARCHITECTURE: Final = "LLaDAModelLM"
