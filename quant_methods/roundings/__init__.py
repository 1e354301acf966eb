# SPDX-License-Identifier: Apache-2.0
"""Rounding of one weight matrix to a grid: to nearest, or with error compensation."""
