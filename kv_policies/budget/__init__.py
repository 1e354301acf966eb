# SPDX-License-Identifier: Apache-2.0
"""How much each layer keeps: levels and profiles."""
