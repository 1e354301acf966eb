# SPDX-License-Identifier: Apache-2.0
"""Environment variables of a replica, its engine core and its workers."""

from compress_common.errors import CompressError

PLUGIN = "compress"  # our name among vLLM's plugins


def environment(env: dict[str, str], cpus: int | None) -> dict[str, str]:
    """Return ``env`` with what a compressed model needs. A variable that is given stays.

    Args:
        env: variables of the user.
        cpus: cores of each rank of an engine on a CPU, else None.

    Raises:
        CompressError: ``env`` keeps the plugin from loading.
    """
    # The plugin must load whatever an image or node sets. Without it nothing would be compressed,
    # and nobody would be told.
    made = {"VLLM_PLUGINS": PLUGIN}
    if cpus is not None:
        # Replicas on one node would all bind their threads to the same cores.
        made |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(cpus)}
    made |= {name: str(value) for name, value in env.items()}
    if PLUGIN not in made["VLLM_PLUGINS"].split(","):
        raise CompressError(
            f"env: VLLM_PLUGINS {made['VLLM_PLUGINS']!r} leaves out this plugin; add {PLUGIN!r}"
        )
    return made
