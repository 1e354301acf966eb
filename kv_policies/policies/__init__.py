# SPDX-License-Identifier: Apache-2.0
"""KV policies: one policy, one file."""
