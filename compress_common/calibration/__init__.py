# SPDX-License-Identifier: Apache-2.0
"""Calibration text, and the passes of a decoder over it, one block at a time."""
