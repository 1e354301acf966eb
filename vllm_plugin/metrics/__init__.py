# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of what is compressed, on vLLM's own ``/metrics`` and on Ray's agent."""
