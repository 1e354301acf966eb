# SPDX-License-Identifier: Apache-2.0
"""A checkpoint on disk: its files, its tensors, its identity, and the model that they make."""
