# SPDX-License-Identifier: Apache-2.0
"""Denoising of masked diffusion language models: canvas, commit rules, cache policies. torch only."""
