# SPDX-License-Identifier: Apache-2.0
"""Searches that know nothing of what they search for."""
