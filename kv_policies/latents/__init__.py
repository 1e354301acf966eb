# SPDX-License-Identifier: Apache-2.0
"""Low-rank latents of keys and values: bases, ranks, packing and attention."""
