# SPDX-License-Identifier: Apache-2.0
"""How to quantise weights: one method, one file. Needs torch only, transformers to calibrate."""
