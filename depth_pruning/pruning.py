# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to a checkpoint with fewer blocks: check, load, search, heal, judge, write."""

import json
from pathlib import Path
from typing import Any

import torch

from compress_common.calibration.memory import check_memory
from compress_common.calibration.placement import Sizes, placed, sizes_of
from compress_common.calibration.precision import check_device, computed_in
from compress_common.calibration.stages import Stages
from compress_common.calibration.text import check_length
from compress_common.calibration.texts import computed, stored_tokens, text_identity
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.checkpoints.companions import module_folders
from compress_common.checkpoints.loading import calibration_blocks, load_model, release
from compress_common.checkpoints.partial import Partial
from compress_common.progress import Progress, silent
from compress_common.space import Need, check_space
from compress_common.store import digest
from depth_pruning.architecture import complete_cut
from depth_pruning.cutting import MARKER
from depth_pruning.finding import Found, Pruning
from depth_pruning.probe import samples_for
from depth_pruning.request import PruneRequest
from depth_pruning.writing import marker_of, write_pruned

KIND = "depth-stage"
_REVISION = 4  # raised when the same request would give another result than before


def sizes(checkpoint: Checkpoint, request: PruneRequest) -> Sizes:
    """Return the bytes of the work on a device."""
    tokens, states = _tokens(request), _states(checkpoint, request)
    return sizes_of(checkpoint.hf_config, checkpoint.weight_bytes, tokens, states=states)


def prune_checkpoint(
    source: Path,
    target: Path,
    request: PruneRequest,
    *,
    device: str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write a checkpoint without some decoder blocks into a new folder.

    A later run of the same request on the same weights goes on where an interrupted one stopped. A
    refused run leaves nothing.

    Args:
        source: Folder of a 16-bit checkpoint.
        target: Folder that must not exist yet.
        request: What goes, and how the rest is healed.
        device: Where decoder blocks are computed.
        progress: Called as the work advances.

    Returns:
        The report, which is written to ``report.json`` too.

    Raises:
        CompressError: Bad input, a set that costs too much, or a folder that cannot be written.
    """
    check_device(device)
    checkpoint = Checkpoint(source)
    request.build_search()
    request.build_healer()
    request.check(checkpoint)
    module_folders(source)
    output = Partial(target)
    if request.layers:
        complete_cut(checkpoint, request.layers)
    if not request.nothing:
        check_length(request.calibration, checkpoint.hf_config)
        check_memory(checkpoint, device, states=_states(checkpoint, request))
        placed(device, sizes(checkpoint, request))
    need = checkpoint.weight_bytes - output.written
    check_space([Need(output.folder.parent, need, "the checkpoint", "--out")])
    with output.writing():
        dtype = None if request.nothing else computed_in(checkpoint.weight_bytes, device)
        stages = Stages(_key(checkpoint, request, dtype), kind=KIND)
        found = Found()
        if not request.nothing:
            found = _found(checkpoint, request, stages, device, dtype, progress)
        config = complete_cut(checkpoint, found.dropped)
        marker = marker_of(checkpoint, found.dropped, request.heal)
        identity = {"key": _key(checkpoint, request, dtype), "dropped": list(found.dropped)}
        output.start_or_resume(identity)
        report = write_pruned(
            checkpoint,
            found.dropped,
            found.healed,
            config | ({MARKER: marker} if found.dropped else {}),
            found.report,
            output.folder,
            progress,
        )
    stages.clear()
    return report


def _tokens(request: PruneRequest) -> int:
    return request.calibration.samples * request.calibration.length


def _states(checkpoint: Checkpoint, request: PruneRequest) -> int:
    """Return how many hidden states stay in memory: those of the search and those of healing."""
    length, tokens = request.calibration.length, _tokens(request)
    probed = samples_for(request.build_search().settings.text_tokens, length) * length
    return min(probed, tokens) * (checkpoint.hf_config.num_hidden_layers + 1) + 4 * tokens


def _key(checkpoint: Checkpoint, request: PruneRequest, dtype: torch.dtype | None) -> str:
    """Return the key of all that the result depends on."""
    content = request.identity() | {"revision": _REVISION} | computed(dtype)
    if not request.nothing:
        content |= {"text": text_identity(checkpoint, request.calibration)}
    return digest(checkpoint.digest, json.dumps(content, sort_keys=True))


def _found(
    checkpoint: Checkpoint,
    request: PruneRequest,
    stages: Stages,
    device: str,
    dtype: torch.dtype | None,
    progress: Progress,
) -> Found:
    """Load the model, and find which blocks go and what replaces them."""
    progress("load model", 0, 1)
    placement = placed(device, sizes(checkpoint, request))
    model = load_model(checkpoint, dtype, placement.model)
    healer = request.build_healer()
    first = torch.arange(request.calibration.length)[None] % checkpoint.hf_config.vocab_size
    healer.check(calibration_blocks(checkpoint, model, first, placement, Stages(), dtype))
    tokens = stored_tokens(checkpoint, request.calibration, model, progress, dtype)
    blocks = calibration_blocks(checkpoint, model, tokens, placement, stages, dtype)
    found = Pruning(blocks, request, progress).run()
    del model, blocks
    release(placement.device)
    return found
