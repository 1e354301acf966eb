# SPDX-License-Identifier: Apache-2.0
"""The bases: low-rank factors of a model's keys and values, in a safetensors file."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from compress_common.errors import CompressError, joined
from kv_policies.latents.bases_header import SIDES, Header, Side
from kv_policies.latents.format import Bits
from kv_policies.latents.low_rank import Factor
from kv_policies.model_file import ModelFingerprint

_HEADER: Final = "vllm-compress"  # the key in the file's metadata


@dataclass(frozen=True)
class Bases:
    """A factor for the keys and a factor for the values of each compressed layer.

    Keys are those after bias and norm and before RoPE.

    Attributes:
        header: What the file says of itself.
        shards: Factors by layer and side, float32, for the KV heads of each rank of tensor
            parallelism.
    """

    header: Header
    shards: Sequence[Mapping[tuple[int, Side], Factor]]

    @property
    def ratio(self) -> Fraction:
        """Share of the bytes of a 16-bit cache that is saved."""
        return self.header.ratio

    @property
    def bits(self) -> Bits:
        """Of a number of a latent in the cache."""
        return self.header.bits

    @property
    def layers(self) -> tuple[int, ...]:
        """Index in the model of each compressed layer, ascending."""
        return self.header.indices

    def ranks(self, layer: int) -> tuple[int, int]:
        """Return how many numbers a token's key and its value take in this layer, in a shard."""
        row = next(row for row in self.header.layers if row.layer == layer)
        return row.key_rank, row.value_rank

    def factor(self, layer: int, side: Side, shard: int = 0) -> Factor:
        """Return the factor of a layer's keys or values.

        Args:
            layer: Index in the model.
            side: Keys or values.
            shard: Rank of tensor parallelism, whose KV heads it is for.
        """
        return self.shards[shard][layer, side]

    def save(self, path: str | Path) -> None:
        """Write the file. The same bases are the same bytes."""
        tensors = {
            self.header.tensor_name(layer, side, shard, part): tensor
            for shard, factors in enumerate(self.shards)
            for (layer, side), factor in factors.items()
            for part, tensor in vars(factor).items()
        }
        header = self.header.text(_contents(tensors))
        # Not ``save_file``: it writes files that only their owner can read, whatever the umask.
        Path(path).write_bytes(save(tensors, {_HEADER: header}))

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: ModelFingerprint | None = None,
        layers: Sequence[int] | None = None,
        weights: str | None = None,
    ) -> "Bases":
        """Read and check bases, to the last byte.

        Args:
            path: The safetensors file.
            model: The model to be served; None: the bases are not compared with one.
            layers: The model's layers that the engine can compress; None: all.
            weights: Digest of the model's weights, as in the header; None: not compared.

        Raises:
            CompressError: Everything that is wrong with the file.
        """
        remedy = Header.remedy(model)
        try:
            with safe_open(path, framework="pt") as opened:
                header, told = Header.parse(
                    _json((opened.metadata() or {}).get(_HEADER)), path, model
                )
                names = list(opened.keys())
                tensors = {name: opened.get_tensor(name) for name in names}
        except OSError as error:
            raise CompressError(f"cannot read the bases {path}: {error}; {remedy}") from error
        except SafetensorError as error:
            raise CompressError(
                f"{path} is damaged, cut short or not safetensors ({error}); {remedy}"
            ) from error
        problems = _tensor_problems(header, tensors)
        if not problems and told != header.digest(_contents(tensors)):
            problems.append("was changed after it was written: its sha256 is another")
        if model is not None:
            problems += header.mismatches(model, layers)
            if weights not in (None, header.weights) and not header.model.differences(model):
                problems.append(
                    f"is made for {header.model.name}, not for {model.name}: their weights differ "
                    "(a fine-tune?)"
                )
        if problems:
            raise joined([f"the bases file {path} {problem}; {remedy}" for problem in problems])
        shards = [
            {
                (layer, side): Factor(
                    *(
                        tensors[header.tensor_name(layer, side, shard, part)]
                        for part in ("encode", "decode", "mean")
                    )
                )
                for layer in header.indices
                for side in SIDES
            }
            for shard in range(header.tensor_parallel)
        ]
        return cls(header, shards)


def _json(text: str | None) -> object:
    try:
        return json.loads(text or "null")
    except ValueError:
        return None


def _contents(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """Names and bytes of the tensors, in one order. The header says their shapes and type."""
    for name in sorted(tensors):
        yield name.encode()
        yield tensors[name].contiguous().flatten().view(torch.uint8).numpy().data


def _tensor_problems(header: Header, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    shapes = header.shapes()
    problems = []
    if missing := shapes.keys() - tensors.keys():
        problems.append(f"lacks {_few(missing)}")
    if extra := tensors.keys() - shapes.keys():
        problems.append(f"has {_few(extra)}, which its header does not name")
    for name in sorted(shapes.keys() & tensors.keys()):
        found, shape = tensors[name], shapes[name]
        if found.shape != shape or found.dtype != torch.float32:
            kind = str(found.dtype).removeprefix("torch.")
            problems.append(
                f"has {name} as {kind} {list(found.shape)}, its header says float32 {list(shape)}"
            )
        elif not bool(torch.isfinite(found).all()):
            problems.append(f"has NaN or infinity in {name}")
    return problems


def _few(names: Iterable[str]) -> str:
    """Return a short text for a list of names: ``6 tensors: a, b, c, ...``."""
    ordered = sorted(names)
    return f"{len(ordered)} tensors: {', '.join(ordered[:3])}{', ...' if len(ordered) > 3 else ''}"
