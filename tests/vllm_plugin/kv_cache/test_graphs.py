# SPDX-License-Identifier: Apache-2.0
"""Full CUDA graphs of decode steps, without a GPU: which steps are replayed, and from which memory.

A replayed graph runs no Python. So it must find live blocks and lengths where they were when it was
captured, and must never stand for a step that ends a prompt.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Second
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as First

from kv_policies.compaction import Layer, workspace
from kv_policies.latents.format import LatentFormat
from kv_policies.latents.packing import Packer
from kv_policies.latents.reading import Reading
from kv_policies.layout.latents import LatentLayout
from kv_policies.layout.step import Step
from kv_policies.layout.tokens import TokenLayout
from kv_policies.planner import Planner
from kv_policies.policies.key_diff import KeyDiff
from kv_policies.recent_queries import RecentQueries
from kv_policies.workspace import Heads
from tests.support.device import Device
from tests.vllm_plugin.kv_cache.test_refusals import configure
from vllm_plugin.kv_cache.activity import Activity
from vllm_plugin.kv_cache.backend import CompressedBuilder, CompressedImpl
from vllm_plugin.kv_cache.batch import Batch
from vllm_plugin.kv_cache.cpu import CPUBuilder
from vllm_plugin.kv_cache.flash import FlashBuilder
from vllm_plugin.kv_cache.pages import Pages
from vllm_plugin.kv_cache.passes import restricted
from vllm_plugin.kv_cache.runner_v1 import CompressedRunnerV1
from vllm_plugin.kv_cache.runner_v2 import CompressedRunnerV2
from vllm_plugin.kv_cache.spec import CompressedSpec
from vllm_plugin.kv_cache.triton import TritonBuilder

FULL, PIECEWISE, NONE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE
MODES = {CUDAGraphMode.FULL_DECODE_ONLY: NONE, CUDAGraphMode.FULL_AND_PIECEWISE: PIECEWISE}
# Requests as (prompt tokens, computed tokens, tokens of the step). The step's graph under stock
# vLLM and under ours; "mixed" is what steps get that are no decodes.
STEPS = {
    "decodes": ([(8, 8, 1), (40, 300, 1)], FULL, FULL),
    "the last token of a prompt": ([(8, 7, 1), (40, 300, 1)], FULL, "mixed"),
    "one token inside a prompt": ([(8, 3, 1)], FULL, "mixed"),
    "a chunk beside a decode": ([(8, 4, 4), (40, 300, 1)], "mixed", "mixed"),
}


@pytest.fixture(scope="module")
def configured(demo_model: Path) -> VllmConfig:
    """An engine's config that captures graphs, which a CPU's does not."""
    config = configure(demo_model, max_num_seqs=4)
    config.compilation_config.cudagraph_capture_sizes = [1, 2, 4, 8]
    config.compilation_config.max_cudagraph_capture_size = 8
    return config


def bare(kind: type, **fields: Any) -> Any:
    """An object of vLLM's with some fields, as ``__init__`` needs a device."""
    made = object.__new__(kind)
    vars(made).update(fields)
    return made


def scheduled(requests: list[tuple[int, int, int]]) -> SchedulerOutput:
    output = SchedulerOutput.make_empty()
    output.num_scheduled_tokens = {str(at): q for at, (_, _, q) in enumerate(requests)}
    output.total_num_scheduled_tokens = sum(output.num_scheduled_tokens.values())
    return output


def second_mode(
    kind: type, config: VllmConfig, mode: CUDAGraphMode, requests: list[tuple[int, int, int]]
) -> CUDAGraphMode:
    """The graph that Model Runner V2 replays, by its own dispatch."""
    n, c, _ = np.array(requests).T
    states = SimpleNamespace(
        req_id_to_index={str(at): at for at in range(len(requests))},
        prefill_len=SimpleNamespace(np=n),
        num_computed_prefill_tokens=np.minimum(n, c),
    )
    fields = {"decode_query_len": 1, "use_pp": False}
    fields |= {"adaptive_verification": None, "pcp_manager": None}
    runner = bare(kind, req_states=states, **fields)
    output = scheduled(requests)
    _, uniform = runner.gather_batch_req_state(output, False)
    manager = bare(
        CudaGraphManager,
        vllm_config=config,
        compilation_config=config.compilation_config,
        cudagraph_mode=mode,
        max_num_reqs=config.scheduler_config.max_num_seqs,
        decode_query_len=1,
        varlen_decode=False,
        ubatch_runner=None,
        lora_capture_cases=[0],
        _lora_dispatch_map={},
        _graphs_captured=True,
        _candidates={},
        _capture_descs={},
    )
    manager._init_candidates()
    tokens = output.total_num_scheduled_tokens
    return manager.dispatch(len(requests), tokens, uniform, 0).cg_mode


def first_mode(
    kind: type, config: VllmConfig, mode: CUDAGraphMode, requests: list[tuple[int, int, int]]
) -> CUDAGraphMode:
    """The graph that the first model runner replays, by its own dispatch."""
    n, c, q = np.array(requests).T
    dispatcher = bare(
        CudagraphDispatcher,
        vllm_config=config,
        compilation_config=config.compilation_config,
        uniform_decode_query_len=1,
        cudagraph_keys={PIECEWISE: set(), FULL: set()},
        keys_initialized=False,
        specialize_lora_count=False,
    )
    dispatcher.initialize_cudagraph_keys(mode)
    batch = SimpleNamespace(
        num_reqs=len(requests),
        num_computed_tokens_cpu=c,
        num_prompt_tokens=n,
        lora_id_to_lora_request={},
    )
    runner = bare(
        kind,
        vllm_config=config,
        model_config=config.model_config,
        input_batch=batch,
        cudagraph_dispatcher=dispatcher,
        uniform_decode_query_len=1,
    )
    found, *_ = runner._determine_batch_execution_and_padding(
        num_tokens=int(q.sum()),
        num_reqs=len(requests),
        num_scheduled_tokens_np=q,
        max_num_scheduled_tokens=int(q.max()),
    )
    return found


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize(
    ("run", "stock", "ours"),
    [
        pytest.param(second_mode, Second, CompressedRunnerV2, id="V2"),
        pytest.param(first_mode, First, CompressedRunnerV1, id="V1"),
    ],
)
def test_no_decode_graph_stands_for_a_prompt(
    configured: VllmConfig, run: Any, stock: type, ours: type, mode: CUDAGraphMode, step: str
) -> None:
    requests, *expected = STEPS[step]
    found = [run(kind, configured, mode, requests) for kind in (stock, ours)]
    assert found == [MODES[mode] if want == "mixed" else want for want in expected]


SPEC = FullAttentionSpec(block_size=32, num_kv_heads=3, head_size=64, dtype=torch.bfloat16)
LAYOUT = TokenLayout(32, Fraction(1, 2), window=64)
WIDTH = 16  # columns of a block table


def table(rows: int) -> torch.Tensor:
    """Block ``100 * row + column``."""
    blocks = 100 * torch.arange(rows, dtype=torch.int32)[:, None]
    return blocks + torch.arange(WIDTH, dtype=torch.int32)


def metadata(requests: list[tuple[int, int, int]], padded: int) -> CommonAttentionMetadata:
    """What vLLM gives to builders, with rows of no tokens up to ``padded``."""
    idle = [(0, 0, 0)] * (padded - len(requests))
    _, c, q = torch.tensor(requests + idle).int().T
    starts = torch.cat((torch.zeros(1), q.cumsum(0))).int()
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=(c + q).int(),
        num_reqs=padded,
        num_actual_tokens=int(q.sum()),
        max_query_len=int(q.max()),
        max_seq_len=int((c + q).max()),
        block_table_tensor=table(padded),
        slot_mapping=torch.zeros(int(q.sum()), dtype=torch.int64),
        req_idx=np.arange(len(requests)),
    )


def equipped(kind: type, config: VllmConfig, device: str = "cpu") -> Any:
    """A builder of one layer with its own blocks, as the worker makes it."""
    builder = kind(CompressedSpec.of(SPEC, LAYOUT), ["layer"], config, torch.device(device))
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=None), num_computed_tokens_np=None)
    states.index_to_req_id = {at: str(at) for at in range(4)}
    runner = SimpleNamespace(req_states=states)
    builder.batch = Batch(runner, v2=True, activity=Activity(1), head=LAYOUT.head)
    policy, heads = KeyDiff(KeyDiff.settings_type()), Heads(3, 3, 64, 2, "cpu")
    space = workspace(policy, heads)
    builder.planner = Planner([LAYOUT], policy, space)
    cache = torch.zeros(400, 3, 32, 128, dtype=torch.bfloat16)

    def write(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        cache[slots // 32, :, slots % 32] = torch.cat((key, value), -1)

    pages = Pages.of(cache, 3, 32, 64, write)
    pages = Pages(pages.blocks.to(device), *pages.orders, pages.shape)
    layer = Layer("layer", 0, pages, heads, policy, space, None)  # type: ignore
    builder.layers = [layer]
    return builder


def run_step(
    builder: Any,
    requests: list[tuple[int, int, int]],
    padded: int = 4,
    seen: AbstractContextManager[Any] | None = None,
    impl: Any = None,
    given: CommonAttentionMetadata | None = None,
) -> Any:
    """What is built inside a step of the worker; what is put off is done behind it.

    ``impl``: computes the layer in between; None where its forward pass has nothing to compact.
    """
    n, c, q = np.array(requests).T
    states = builder.batch._runner.req_states
    states.prompt_len.np, states.num_computed_tokens_np = n, c
    device = builder.layers[0].pages.blocks.device
    given = there(given or metadata(requests, padded), device)
    query, output = torch.zeros(2, int(q.sum()), 3, 64, dtype=torch.bfloat16, device=device)
    with builder.batch.step(SchedulerOutput.make_empty()), seen or nullcontext():
        built = builder.build(0, given)
        if impl is not None:
            impl.forward(None, query, query, query, None, built, output)
        builder.batch.finish()
    return built


def there(metadata: CommonAttentionMetadata, device: torch.device) -> CommonAttentionMetadata:
    """With the tensors that vLLM has on the device; the others stay on the host."""
    names = ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping")
    return metadata.replace(**{name: getattr(metadata, name).to(device) for name in names})


@pytest.mark.parametrize("kind", [TritonBuilder, FlashBuilder])
def test_what_a_graph_reads_stays_where_it_was_captured(kind: type, configured: VllmConfig) -> None:
    builder = equipped(kind, configured)
    # vLLM captures the largest graph first, of dummy requests, outside of any step.
    captured = {
        rows: builder.build_for_cudagraph_capture(metadata([(0, 0, 1)] * rows, rows))
        for rows in (4, 2, 1)
    }
    decodes = [(256, 256, 1), (256, 330, 1), (64, 400, 1)]
    for requests, padded in [
        (decodes, 4),
        ([(n, c + 1, 1) for n, c, _ in decodes], 4),  # nothing moved
        ([(256, 352, 1)], 1),  # others have left, another row has come up
        ([(40, 500, 1), (256, 400, 1)], 2),
    ]:
        built = run_step(builder, requests, padded)
        for name in ("block_table", "seq_lens"):
            ours, graphs = getattr(built, name), getattr(captured[padded], name)
            assert ours.data_ptr() == graphs.data_ptr()
            assert (ours.shape, ours.stride()) == (graphs.shape, graphs.stride())
        for row in range(padded):
            n, c, q = requests[row] if row < len(requests) else (0, 0, 0)
            phase = LAYOUT.phase(np.array([n]), np.array([c]))
            seen = c + q - int(LAYOUT.hidden(phase)[0])
            assert built.seq_lens[row] == seen
            live = LAYOUT.columns(phase, LAYOUT.hidden(phase), WIDTH)[0][: -(-seen // 32)]
            assert built.block_table[row, : len(live)].tolist() == (100 * row + live).tolist()


def test_queries_of_a_decode_step_go_where_a_graph_stores_them(configured: VllmConfig) -> None:
    """To the ring of each row's request, by way of the same memory, without a copy from the host
    as long as the rows are the same."""
    builder = equipped(TritonBuilder, configured)
    recent = RecentQueries(8, 4, 1, 3, 64, torch.bfloat16, torch.device("cpu"))
    builder.batch.recent = recent
    (layer,) = builder.layers
    builder.layers = [replace(layer, recent=recent.stored)]
    captured = {
        rows: builder.build_for_cudagraph_capture(
            metadata([(0, 0, 1)] * rows, rows)
        ).vllm_compress_parts[0]
        for rows in (3, 2)  # fewer than requests that may run
    }
    (large,) = run_step(builder, [(0, 9 + at, 1) for at in range(4)], 4).vllm_compress_parts
    assert large.storing.places.data_ptr() == captured[2].storing.places.data_ptr()
    nobody = list(range(32, 40))
    assert all(part.storing.places.tolist()[0] in nobody for part in captured.values())
    decodes = [(256, 260, 1), (0, 330, 1), (64, 401, 1)]  # the second has opted out
    for c in range(3):
        requests = [(n, at + c, q) for n, at, q in decodes]
        given = metadata(requests, 4).replace(num_actual_tokens=4)
        (part,) = run_step(builder, requests, 4, given=given).vllm_compress_parts
        assert part.storing.places.data_ptr() == captured[3].storing.places.data_ptr()
        first, out, third, padding = part.storing.places.tolist()
        assert out in nobody and padding in nobody
        assert first % 8 == (260 + c) % 8 and third % 8 == (401 + c) % 8
        assert first // 8 != third // 8 and {first, third}.isdisjoint(nobody)
    impl = Impl()
    (impl.chosen,) = builder.layers
    query = torch.arange(4.0)[:, None, None].expand(4, 3, 64).bfloat16()
    impl._store(part.storing, query)
    assert recent.stored[[first, third]].unique(dim=1).flatten(1)[:, 0].tolist() == [0, 2]


LATENTS = LatentLayout(32, 64, 32, window=64)


def with_latents(config: VllmConfig, device: str = "cpu") -> Any:
    """A builder of one layer whose kept blocks are latents; it remembers what it packs."""
    builder = equipped(FlashBuilder, config, device)
    builder.kv_cache_spec = CompressedSpec.of(SPEC, LATENTS)
    builder.planner = Packer([(LATENTS, LatentFormat(8, 8, 16, 64))])
    packed: list[Any] = []
    cache = SimpleNamespace(clear=lambda blocks: None, packed=packed)
    cache.pack = lambda parts, pages: packed.append((parts, pages))
    builder.latents, builder.pages = [cache], [builder.layers[0].pages]
    return builder


@pytest.fixture
def graphs(configured: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> VllmConfig:
    """As on a GPU by default: a CPU has no graphs."""
    mode = CUDAGraphMode.FULL_AND_PIECEWISE
    monkeypatch.setattr(configured.compilation_config, "cudagraph_mode", mode)
    return configured


def tensors_of(reading: Reading) -> list[torch.Tensor]:
    contents = reading.contents
    read = [reading.tokens, reading.seen, reading.raw, reading.blocks]
    return [*read, contents.first, contents.count]


def test_latents_stay_where_a_graph_reads_them(graphs: VllmConfig) -> None:
    builder = with_latents(graphs)
    captured = {}
    for rows in (4, 2, 1):
        built = builder.build_for_cudagraph_capture(metadata([(0, 0, 1)] * rows, rows))
        (part,) = built.vllm_compress_parts
        assert part.work is None and part.reading.whole
        assert not part.reading.contents.count.any()
        captured[rows] = part.reading
    decodes = [(64, 64, 1), (64, 130, 1), (0, 90, 1)]  # the last has opted out
    for requests, padded in [
        (decodes, 4),
        ([(n, c + 1, 1) for n, c, _ in decodes], 4),
        ([(256, 352, 1)], 1),
        ([(40, 300, 1), (256, 400, 1)], 2),
    ]:
        given = metadata(requests, padded).replace(num_actual_tokens=padded)
        (part,) = run_step(builder, requests, padded, given=given).vllm_compress_parts
        assert part.reading is not captured[padded]
        both = zip(tensors_of(part.reading), tensors_of(captured[padded]), strict=True)
        for ours, theirs in both:
            assert ours.data_ptr() == theirs.data_ptr()
            assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride())
        for row in range(padded):
            n, c, q = requests[row] if row < len(requests) else (0, 0, 0)
            old = int(LATENTS.hidden(LATENTS.phase(np.array([n]), np.array([c])))[0])
            assert int(part.reading.contents.count[row].sum()) == old
            assert int(part.reading.seen[row]) == c + q - old


def test_steps_with_several_tokens_read_exactly_what_there_is(graphs: VllmConfig) -> None:
    builder = with_latents(graphs)
    (part,) = run_step(builder, [(64, 130, 1), (64, 0, 40)], 2).vllm_compress_parts
    assert part.reading.tokens.tolist() == [[0]] and not part.reading.whole
    (part,) = run_step(builder, [(64, 0, 64)], 1).vllm_compress_parts
    assert part.reading is None


def test_latents_are_packed_after_the_forward_pass(graphs: VllmConfig) -> None:
    builder = with_latents(graphs)
    for requests in ([(64, 127, 1)], [(64, 0, 64), (64, 90, 1)]):  # a window, and a prompt, end
        (part,) = run_step(builder, requests, len(requests)).vllm_compress_parts
        assert part.work is None
        (packed,) = builder.latents[0].packed
        assert packed[0] and packed[1] is builder.pages[0]
        builder.latents[0].packed.clear()
    run_step(builder, [(64, 100, 1)], 1)
    assert not builder.latents[0].packed


def test_a_step_of_latents_waits_for_nothing(graphs: VllmConfig) -> None:
    builder = with_latents(graphs, "meta")
    run_step(builder, [(64, 70, 1), (64, 130, 1)], 2, seen=Device())
    for requests, copies in (
        ([(64, 71, 1), (64, 131, 1)], 0),
        ([(64, 72, 1), (64, 191, 1)], 1),  # a window ends: what is packed
        ([(64, 73, 1), (64, 192, 1)], 3),  # what is raw, what is latents, a block is begun
        ([(64, 74, 1), (64, 193, 1)], 0),
    ):
        seen = Device()
        run_step(builder, requests, 2, seen=seen)
        assert not seen.waits
        assert seen.copies == copies, requests
        if not copies:
            assert sorted(seen.operations) == ["gather", "gather", "sub"]


class Attention:
    """In place of a backend's own: nothing is computed."""

    scale = 1.0

    def forward(self, *args: Any) -> None:
        pass


class Impl(CompressedImpl, Attention):
    pass


def test_a_step_waits_for_nothing(configured: VllmConfig) -> None:
    """A decode step that compacts nothing queues two operations and copies nothing from the host.
    One that does copies its plan, but reads nothing back: no number, no mask."""
    builder = equipped(TritonBuilder, configured, "meta")
    run_step(builder, [(256, 256, 1), (256, 317, 1)], seen=Device())
    for requests, copies in (
        ([(256, 257, 1), (256, 318, 1)], 0),
        ([(256, 258, 1), (256, 319, 1)], 2),  # a window ends: what is read of it, what stays
        ([(256, 259, 1), (256, 320, 1)], 1),  # its tokens are hidden
        ([(256, 260, 1), (256, 321, 1)], 0),
        ([(256, 261, 1), (256, 322, 1), (40, 400, 1)], 1),  # a request joins
        ([(256, 323, 1), (40, 401, 1)], 1),  # another leaves
    ):
        seen = Device()
        run_step(builder, requests, seen=seen)
        assert not seen.waits
        assert seen.copies == copies, requests
        if not copies:
            assert sorted(seen.operations) == ["gather", "sub"]


def test_passes_of_a_resumed_request_wait_for_nothing(configured: VllmConfig) -> None:
    """It recomputes a prompt and windows behind it in one step, beside one that decodes."""
    builder = equipped(TritonBuilder, configured, "meta")
    impl = Impl()
    (impl.chosen,) = builder.layers
    impl.batch, impl.pages = builder.batch, impl.chosen.pages
    seen = Device()
    built = run_step(builder, [(256, 0, 400), (64, 90, 1)], seen=seen, impl=impl)
    parts = built.vllm_compress_parts
    assert len(parts) == 4 and all(part.tokens.device.type == "meta" for part in parts)
    tables = [part.metadata.block_table for part in parts]
    assert [len(blocks) for blocks in tables] == [2, 1, 1, 1]
    row = 4 * WIDTH  # bytes; no room is made for other requests than those of a pass
    assert [x.untyped_storage().nbytes() // row for x in tables] == [2, 1, 1, 1]
    assert not seen.waits


def test_pictures_attend_both_ways_in_the_passes_of_their_prompts_alone() -> None:
    """Rows have other numbers in a pass, and behind a prompt places are shifted."""

    def step(n: list[int], c: list[int], q: list[int], ids: list[str]) -> Step:
        starts = np.cumsum([0, *q[:-1]])
        return Step(np.array(n), np.array(c), np.array(q), starts, ids)

    whole = step([9, 32, 0], [40, 0, 0], [1, 40, 8], ["decodes", "resumed", "opted out"])
    metadata = CommonAttentionMetadata(
        query_start_loc=torch.tensor([0, 1, 41, 49]),
        query_start_loc_cpu=torch.tensor([0, 1, 41, 49]),
        seq_lens=torch.tensor([41, 40, 8]),
        num_reqs=3,
        num_actual_tokens=49,
        max_query_len=40,
        max_seq_len=41,
        block_table_tensor=torch.arange(6).view(3, 2),
        slot_mapping=torch.arange(49),
        mm_req_doc_ranges={0: [(2, 5)], 1: [(4, 9)], 2: [(1, 3)]},
    )
    prompts = step([9, 32, 0], [40, 0, 0], [1, 32, 8], ["decodes", "resumed", "opted out"])
    tokens = np.r_[0:33, 41:49]
    assert restricted(metadata, whole, prompts, tokens)[0].mm_req_doc_ranges == {
        1: [(4, 9)],
        2: [(1, 3)],
    }
    opted_out = step([0], [0], [8], ["opted out"])
    found, _ = restricted(metadata, whole, opted_out, np.arange(41, 49))
    assert found.mm_req_doc_ranges == {0: [(1, 3)]}
    behind = step([32], [32], [8], ["resumed"])
    found, _ = restricted(metadata, whole, behind, np.arange(33, 41))
    assert found.mm_req_doc_ranges is None


def test_windows_are_compacted_after_the_forward_pass(configured: VllmConfig) -> None:
    """And nothing else than attention is left in the forward pass of a decode step."""
    builder = equipped(TritonBuilder, configured)
    pages = builder.layers[0].pages
    pages.blocks.copy_(torch.randn(pages.blocks.shape))
    before = pages.blocks.clone()
    window = [(256, 319, 1)]  # ends here, in columns 8 and 9; one of them is freed
    built = run_step(builder, window)
    assert [part.work for part in built.vllm_compress_parts] == [None]
    changed = (pages.blocks != before).any(1).nonzero().flatten().tolist()
    assert changed == [9]
    done = builder.batch.activity.take()
    assert done.segments == {"window": 1} and done.seconds > 0


def test_a_prompt_that_a_graph_skipped_ends_the_engine(configured: VllmConfig) -> None:
    """Its blocks would be freed, and what was to be kept of them lost."""
    builder = equipped(TritonBuilder, configured)
    with pytest.raises(RuntimeError, match="not compacted .* in 1 layers: .*cudagraph_mode NONE"):
        run_step(builder, [(256, 255, 1)])
    run_step(builder, [(256, 256, 1)])  # the next step starts anew


@pytest.mark.parametrize(
    ("kind", "kv", "expected"),
    [
        (TritonBuilder, {"policy": "snap_kv", "keep": 0.25}, "UNIFORM_SINGLE_TOKEN_DECODE"),
        (FlashBuilder, {"policy": "recent", "keep": 0.25}, "UNIFORM_SINGLE_TOKEN_DECODE"),
        (FlashBuilder, {"policy": "cskv", "keep": 1}, "UNIFORM_SINGLE_TOKEN_DECODE"),
        (FlashBuilder, {"policy": "cskv", "bases": "kv"}, "UNIFORM_SINGLE_TOKEN_DECODE"),
        (TritonBuilder, {"policy": "cskv", "bases": "kv"}, "UNIFORM_SINGLE_TOKEN_DECODE"),
        (CPUBuilder, {"policy": "snap_kv", "keep": 0.25}, "NEVER"),
    ],
)
def test_graphs_of_each_policy(
    kind: type[CompressedBuilder], kv: dict[str, Any], expected: str
) -> None:
    """vLLM takes the least of all layers, so what is asked of a model must not differ by group."""
    config = SimpleNamespace(additional_config={"compress": {"kv": kv}})
    support: AttentionCGSupport = kind.get_cudagraph_support(config, None)
    assert support.name == expected
