# SPDX-License-Identifier: Apache-2.0
"""What `profile` and `calibrate-kv` measure of a model in transformers."""
