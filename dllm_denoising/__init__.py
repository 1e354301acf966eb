# SPDX-License-Identifier: Apache-2.0
"""Masked diffusion language models: canvas, commit rules and cache policies, in torch alone."""
