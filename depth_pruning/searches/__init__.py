# SPDX-License-Identifier: Apache-2.0
"""Searches choose the blocks that are dropped, one per file; ``registry`` lists them."""
