# SPDX-License-Identifier: Apache-2.0
"""Which blocks of a request are live, for chosen tokens and for latents."""
