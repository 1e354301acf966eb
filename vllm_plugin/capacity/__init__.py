# SPDX-License-Identifier: Apache-2.0
"""What a deployment holds, computed from configs and headers: bytes, blocks, requests."""
