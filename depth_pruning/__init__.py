# SPDX-License-Identifier: Apache-2.0
"""Depth pruning: choose decoder blocks to drop, heal the rest, write a standard checkpoint."""
