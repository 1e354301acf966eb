# SPDX-License-Identifier: Apache-2.0
"""Plans and checkpoints: how quantized weights are stored."""
