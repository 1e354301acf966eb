# SPDX-License-Identifier: Apache-2.0
"""Weight quantization: one method, one file. Needs torch, and transformers to calibrate."""
