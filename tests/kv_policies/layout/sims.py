# SPDX-License-Identifier: Apache-2.0
"""The layouts drawn at random, and simulations of engines that use them."""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeVar

import torch
from hypothesis import strategies as st

from kv_policies.latents.format import LatentFormat
from kv_policies.latents.packing import Packer
from kv_policies.latents.reading import LatentView
from kv_policies.layout.bounded import BoundedLayout
from kv_policies.layout.latents import LatentLayout
from kv_policies.layout.segments import Segment
from kv_policies.layout.tokens import TokenLayout
from kv_policies.layout.view import LiveView
from tests.support.layout_sim import Sim, step_of

KEEPS = st.fractions(min_value=Fraction(1, 60), max_value=1, max_denominator=60)


@st.composite
def token_layouts(draw: st.DrawFn) -> TokenLayout:
    block_size = draw(st.integers(2, 8))
    return TokenLayout(
        block_size,
        draw(KEEPS),
        window=block_size * draw(st.integers(0, 5)),
        min_blocks=draw(st.integers(1, 3)),
        min_prompt=block_size * draw(st.integers(0, 6)),
    )


@st.composite
def bounded_layouts(draw: st.DrawFn) -> BoundedLayout:
    block_size, window = draw(st.integers(2, 8)), draw(st.integers(1, 3))
    budget = 2 * window + draw(st.integers(0, 8))
    return BoundedLayout(block_size, block_size * budget, block_size * window)


@st.composite
def windowed_layouts(draw: st.DrawFn) -> BoundedLayout:
    """Their prompts are compacted while they are computed."""
    layout = draw(bounded_layouts())
    more = draw(st.integers(1, 6)) * layout.block_size
    return replace(layout, prompt_window=layout.budget + more)


@st.composite
def latent_layouts(draw: st.DrawFn) -> tuple[LatentLayout, int]:
    """A layout, and the tokens of which latents are written at once."""
    block_size = draw(st.integers(2, 8))
    unit = block_size * draw(st.integers(1, 3))
    written = draw(st.sampled_from([size for size in range(1, unit + 1) if unit % size == 0]))
    tokens = -(-(block_size + draw(st.integers(1, 40))) // written) * written
    layout = LatentLayout(
        block_size,
        tokens,
        unit,
        window=unit * draw(st.integers(0, 3)),
        min_prompt=block_size * draw(st.integers(0, 6)),
        recent=block_size * draw(st.integers(0, 2)),
    )
    return layout, written


Chooses = TypeVar("Chooses", TokenLayout, BoundedLayout)


class ChoosingSim(Sim[Chooses]):
    """Tokens are chosen by a number that each has."""

    def attend(self, c: int, q: int) -> None:
        view, seen = LiveView(self.layout).update(
            step_of((self.n, c, q)), torch.tensor([self.table]), torch.tensor([c + q])
        )
        tokens = [token for block in view[0].tolist() for token in self.blocks[block]]
        assert tokens[: int(seen)] == self.expected(c, q)

    def compact(self, c: int, q: int) -> None:
        bs = self.layout.block_size
        for segment in self.layout.segments(self.n, c + q, after=c):
            source = [
                token
                for column in range(segment.start, segment.stop)
                for token in self.blocks[self.table[column]]
            ]
            self.check(segment, source)
            kept = self.chosen(source, segment.kept * bs)
            for i, column in enumerate(range(*segment.destination)):
                self.blocks[self.own(column)] = kept[i * bs : (i + 1) * bs]

    def expected(self, c: int, q: int) -> list[object]:
        """What step [c, c + q) must see, from the rules in words."""
        raise NotImplementedError

    def check(self, segment: Segment, source: list[object]) -> None:
        """Check what a segment holds when it is compacted."""

    def chosen(self, tokens: list[object], kept: int) -> list[object]:
        order = sorted(tokens, key=lambda token: (token[1] * 7919) % 101)[:kept]  # type: ignore[index]
        return [token for token in tokens if token in order]


class TokenSim(ChoosingSim[TokenLayout]):
    """A segment holds raw tokens."""

    def expected(self, c: int, q: int) -> list[object]:
        """What step [c, c + q) must see, from the rules in words: kept tokens, then raw ones."""
        bs, lay = self.layout.block_size, self.layout
        bounds = [(0, self.n // bs, self.n, self.n >= lay.min_prompt)]
        at = -(-self.n // bs)
        while lay.window and at * bs + lay.window <= c:
            size = lay.window // bs
            bounds.append((at, at + size, (at + size) * bs, True))
            at += size
        seen: list[object] = []
        done = 0
        for start, stop, ends, compacts in bounds:
            if ends > c or lay.kept(stop - start) == stop - start or not compacts:
                continue
            seen += [("raw", p) for p in range(done, start * bs)]
            seen += self.chosen(self.raw(start, stop), lay.kept(stop - start) * bs)
            done = stop * bs
        return seen + [("raw", p) for p in range(done, c + q)]

    def check(self, segment: Segment, source: list[object]) -> None:
        assert source == self.raw(segment.start, segment.stop)

    def raw(self, start: int, stop: int) -> list[object]:
        bs = self.layout.block_size
        return [("raw", p) for p in range(start * bs, stop * bs)]


class BoundedSim(ChoosingSim[BoundedLayout]):
    """A segment also holds tokens that were chosen before."""

    def expected(self, c: int, q: int) -> list[object]:
        """One token after the other."""
        bs, budget, window = self.layout.block_size, self.layout.budget, self.layout.window
        full = self.n // bs * bs
        whole = full + bs if full + bs + 2 * window <= budget else 0
        live: list[object] = []
        for position in range(c):
            live.append(("raw", position))
            behind = position + 1 - (full + bs)
            if position + 1 == self.n and full > budget:
                live = self.chosen(live[:full], budget) + live[full:]
            elif behind > 0 and behind % window == 0 and position >= self.n:
                live = live[:whole] + self.chosen(live[whole:], budget - whole)
        return live + [("raw", p) for p in range(c, c + q)]


@dataclass(frozen=True)
class Unit(LatentFormat):
    """A format that writes any number of tokens at once."""

    size: int = 1

    @property
    def unit(self) -> int:
        return self.size


class LatentSim(Sim[LatentLayout]):
    """Latents of a token are told from its raw content by name only."""

    written: int

    def attend(self, c: int, q: int) -> None:
        table, step = torch.tensor([self.table]), step_of((self.n, c, q))
        view, seen_ = LiveView(self.layout).update(step, table, torch.tensor([c + q]))
        seen = int(seen_)
        found: list[object] = []
        reading = LatentView(self.layout).update(step, table, view)
        if reading is not None:
            contents = reading.contents
            rows = (x[0].tolist() for x in (reading.blocks, contents.first, contents.count))
            for block, first, count in zip(*rows, strict=True):
                assert self.blocks[block][:count] == [("latent", first + i) for i in range(count)]
                found += range(first, first + count)
            assert contents.longest == len(found)
        bs = self.layout.block_size
        blocks = view[0, : -(-seen // bs)].tolist()
        raw = [token for block in blocks for token in self.blocks[block][:bs]][:seen]
        assert all(kind == "raw" for kind, _ in raw)  # type: ignore[misc]
        found += [position for _, position in raw]  # type: ignore[misc]
        assert sorted(found) == list(range(c + q))  # type: ignore[type-var]
        # Nothing is held but what is read, and what the step's end will free.
        live = len(raw) // bs + (len(raw) % bs > 0) + (len(reading.blocks[0]) if reading else 0)
        freed = sum(stop - first for first, stop in self.layout.freed(self.n, c))
        assert live == -(-(c + q) // bs) - freed

    def compact(self, c: int, q: int) -> None:
        table, step = torch.tensor([self.table]), step_of((self.n, c, q))
        form = Unit(1, 1, 16, self.layout.tokens, self.written)
        packings = Packer([(self.layout, form)]).work(self.layout, step, table)
        ending = list(self.layout.segments(self.n, c + q, after=c))
        if packings is None:
            assert not ending
            return
        (segment,), (packing,) = ending, packings.parts
        fresh = {self.table[column] for column in range(*segment.destination)}
        assert set(packing.fresh.tolist()) == fresh and len(packing.fresh) == len(fresh)
        bs, size = self.layout.block_size, self.written
        raw = packing.blocks.flatten().tolist()
        source = [token for block in raw for token in self.blocks[block]]
        first = int(packing.first[0])
        assert (packing.first - first).tolist() == list(range(0, len(source), self.layout.unit))
        assert source == [("raw", first + i) for i in range((segment.stop - segment.start) * bs)]
        (tally,) = packings.tallies
        assert tally.tokens == len(source) and tally.kept == len(fresh) * bs
        for block in fresh:
            self.blocks[block] = ["nothing"] * self.layout.tokens
        rows = zip(packing.destination.tolist(), packing.slot.tolist(), strict=True)
        for unit, (block, slot) in enumerate(rows):
            assert block == self.own(self.table.index(block))
            place = slice(slot * size, (slot + 1) * size)
            assert self.blocks[block][place] == ["nothing"] * size
            self.blocks[block][place] = [
                ("latent", first + i) for i in range(unit * size, (unit + 1) * size)
            ]


@st.composite
def token_sims(draw: st.DrawFn) -> TokenSim:
    return TokenSim(draw(token_layouts()), n=draw(st.integers(1, 70)), lag=draw(st.integers(0, 2)))


@st.composite
def bounded_sims(draw: st.DrawFn) -> BoundedSim:
    layout, prompt = draw(bounded_layouts() | windowed_layouts()), draw(st.integers(1, 120))
    return BoundedSim(layout, layout.head(prompt), draw(st.integers(0, 2)), prompt=prompt)


@st.composite
def latent_sims(draw: st.DrawFn) -> LatentSim:
    layout, written = draw(latent_layouts())
    sim = LatentSim(layout, n=draw(st.integers(1, 70)), lag=draw(st.integers(0, 2)))
    sim.written = written
    return sim
