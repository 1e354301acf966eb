# SPDX-License-Identifier: Apache-2.0
"""Weight-quantization methods: one file, one method."""
