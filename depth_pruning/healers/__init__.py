# SPDX-License-Identifier: Apache-2.0
"""Healers change the weights of the blocks that stay, one per file; ``registry`` lists them."""
