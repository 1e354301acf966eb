# SPDX-License-Identifier: Apache-2.0
"""Which unit of which layer gets how many bits."""
