# SPDX-License-Identifier: Apache-2.0
"""What to keep of a KV cache: one policy, one file. Needs torch only."""
