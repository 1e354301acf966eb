# SPDX-License-Identifier: Apache-2.0
"""KV-cache compression in vLLM's engine: what a request keeps, and where it lies.

``spec`` and ``manager`` are the scheduler's side, ``worker``, ``batch``, ``backend`` and ``pages``
the worker's. Both call ``kv_policies.layout`` and exchange no messages. ``support`` refuses what
cannot work, ``requests`` is what one request may ask for.
"""
