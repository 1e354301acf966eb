# SPDX-License-Identifier: Apache-2.0
"""What a search is asked for, and which levels a target can serve."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress_common.calibration.placement import Sizes, chosen_device, sizes_of
from compress_common.calibration.text import CalibrationSettings
from compress_common.checkpoints.checkpoint import Checkpoint
from compress_common.errors import CompressError
from compress_common.structure.derive import structure_of
from quant_methods.allocators.base import Allocator
from quant_methods.allocators.registry import build_allocator
from quant_methods.base import GridSettings
from quant_methods.calibration.images import ImageSettings
from quant_methods.grid import SIXTEEN


@dataclass(frozen=True)
class Target:
    """What serves a mixed checkpoint.

    Attributes:
        levels: Bits that it can serve, besides 16.
        eight_bit: How units of 8 bits are stored for it.
        default: Levels to choose from unless the user names others.
    """

    levels: tuple[int, ...]
    eight_bit: Literal["w8a8", "w8a16"]
    default: tuple[int, ...]


TARGETS: Final = {
    # The plugin unpacks 2 and 3 bits to int4 at load: they save disk and no memory.
    "cpu": Target((2, 3, 4, 8), "w8a8", (4, 8, SIXTEEN)),
    "cuda": Target((4, 8), "w8a8", (4, 8)),
    "humming": Target((2, 3, 4, 5, 6, 8), "w8a16", (2, 3, 4, 5, 6, 8)),
}


class SearchRequest(BaseModel):
    """Everything besides the checkpoint that decides an allocation.

    Attributes:
        budget: Stored bits per weight of the decoder's linears, scales and zero points included.
        levels: Bits that a unit may have; None: the target's.
        search_samples: Sequences that probes measure on. They come from where the calibration's
            come from, but are others: on its own calibration text a rounding looks too good.
        images: Chats with images that the method looks at besides; None: none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    budget: float = Field(gt=0, le=SIXTEEN)
    method: str = "probe"
    settings: dict[str, Any] = Field(default_factory=dict)
    target: str = "cpu"
    levels: tuple[int, ...] | None = None
    group_size: Literal[32, 64, 128] = 128
    symmetric: bool = False
    tensor_parallel: int = Field(1, ge=1)
    calibration: CalibrationSettings = CalibrationSettings(samples=64, length=128)
    search_samples: int = Field(32, ge=1, le=4096)
    images: ImageSettings | None = None

    def chosen_levels(self) -> tuple[int, ...]:
        """Return the levels, ascending; CompressError when the target cannot serve one."""
        if self.target not in TARGETS:
            raise CompressError(f"unknown target {self.target!r}; valid: {', '.join(TARGETS)}")
        target = TARGETS[self.target]
        chosen = sorted(set(target.default if self.levels is None else self.levels))
        servable = (*target.levels, SIXTEEN)
        if bad := [bits for bits in chosen if bits not in servable]:
            others = [name for name, t in TARGETS.items() if set(chosen) <= {*t.levels, SIXTEEN}]
            elsewhere = f", or give --target {' or '.join(others)}" if others else ""
            raise CompressError(
                f"the target {self.target} cannot serve units of {_listed(bad)} bits; it serves "
                f"{_listed(servable)}. Leave them out of the levels{elsewhere}"
            )
        if not chosen or chosen == [SIXTEEN]:
            raise CompressError(
                f"no level to quantize to; the target {self.target} serves {_listed(target.levels)}"
            )
        return tuple(chosen)

    def grid_settings(self) -> GridSettings:
        """Return the settings that grids of all levels share."""
        return GridSettings(
            bits=next(bits for bits in self.chosen_levels() if bits != SIXTEEN),
            group_size=self.group_size,
            symmetric=self.symmetric,
            eight_bit=TARGETS[self.target].eight_bit,
            tensor_parallel=self.tensor_parallel,
        )

    def shared_grid(self) -> dict[str, Any]:
        """Return the settings that `quantize` must have too, so that sizes are as counted."""
        given = self.grid_settings()
        names = ("group_size", "symmetric", "eight_bit", "tensor_parallel")
        return {name: getattr(given, name) for name in names}

    def allocator(self) -> Allocator:
        """Return the allocator; CompressError when its name or a setting is not valid."""
        allocator = build_allocator(self.method, self.settings)
        if self.images is not None and not allocator.takes_images:
            raise CompressError(
                f"{self.method} does not look at images; leave --images out, or give --method luq"
            )
        return allocator

    def check_text(self) -> None:
        """Raise CompressError when the method measures on more text than there is."""
        need, have = self.allocator().settings.search_tokens(), self._search_tokens
        if need > have:
            raise CompressError(
                f"{self.method} measures on {need} tokens, and the search has {have} "
                f"({self.search_samples} samples of {self.calibration.length}); raise the search "
                "samples or lower `tokens`"
            )

    def sizes(self, checkpoint: Checkpoint) -> Sizes:
        """Return the bytes of the search on a device."""
        given, config = self.calibration, checkpoint.hf_config
        if structure_of(config).has_experts:  # refuses others
            raise CompressError(
                "search does not measure routed experts; write the bits of each unit to a file by "
                "hand, and quantize with --set allocation=FILE"
            )
        tokens = given.samples * given.length
        states = 2 * tokens + (config.num_hidden_layers + 2) * self._search_tokens
        most = max(tokens, self._search_tokens)
        return sizes_of(config, checkpoint.weight_bytes, most, states)

    def chosen_device(self, checkpoint: Checkpoint, device: str) -> str:
        """Return the device that a name, "auto" for one, stands for."""
        return chosen_device(device, partial(self.sizes, checkpoint))

    @property
    def _search_tokens(self) -> int:
        return self.search_samples * self.calibration.length


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))
