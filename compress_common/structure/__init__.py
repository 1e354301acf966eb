# SPDX-License-Identifier: Apache-2.0
"""The structure of a decoder, found by following one forward pass."""
