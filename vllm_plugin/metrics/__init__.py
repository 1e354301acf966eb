# SPDX-License-Identifier: Apache-2.0
"""What is compressed, as Prometheus metrics on vLLM's own ``/metrics`` and on Ray's agent."""
