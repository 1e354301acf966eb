# SPDX-License-Identifier: Apache-2.0
"""Quantized weights in vLLM: config, loader, schemes and CPU kernels."""
