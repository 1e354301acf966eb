# SPDX-License-Identifier: Apache-2.0
"""Measurements of a model in transformers, for `profile` and `calibrate-kv`."""
