# SPDX-License-Identifier: Apache-2.0
"""Quantised weights in vLLM: config, loader, schemes and CPU kernels."""
