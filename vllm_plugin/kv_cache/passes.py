# SPDX-License-Identifier: Apache-2.0
"""The metadata of one of several passes of a step: see ``Step.passes``."""

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from kv_policies.layout.segments import IntArray
from kv_policies.layout.step import Step
from kv_policies.transfer import to_device


def restricted(
    metadata: CommonAttentionMetadata, step: Step, part: Step, tokens: IntArray
) -> tuple[CommonAttentionMetadata, torch.Tensor]:
    """The metadata of one pass: of some requests, some tokens. And these tokens, on the device."""
    row = np.array([step.ids.index(name) for name in part.ids])
    starts = np.concatenate(([0], part.q.cumsum()))
    rows, chosen, starts_there, lengths = to_device(
        metadata.block_table_tensor.device, row, tokens, starts, part.end
    )
    ranges = metadata.mm_req_doc_ranges  # rows -> positions of pictures, which attend both ways
    if ranges is not None:
        # Behind the prompt the places that a pass sees are shifted, and no picture is there.
        prompts = np.flatnonzero((part.c < part.n) | (part.n == 0)).tolist()
        ranges = {new: ranges[row[new]] for new in prompts if row[new] in ranges}
    prefilling = metadata.is_prefilling  # on the host also beside a GPU
    restricted = metadata.replace(
        query_start_loc=starts_there.to(metadata.query_start_loc.dtype),
        query_start_loc_cpu=torch.from_numpy(starts).to(metadata.query_start_loc_cpu.dtype),
        seq_lens=lengths.to(metadata.seq_lens.dtype),
        seq_lens_cpu_upper_bound=torch.from_numpy(part.end).int(),
        num_reqs=len(row),
        num_actual_tokens=len(tokens),
        max_query_len=int(part.q.max()),
        block_table_tensor=metadata.block_table_tensor[rows],
        slot_mapping=metadata.slot_mapping[chosen],
        positions=None if metadata.positions is None else metadata.positions[chosen],
        mm_req_doc_ranges=ranges or None,
        is_prefilling=None if prefilling is None else prefilling[torch.from_numpy(row)],
    )
    return restricted, chosen
