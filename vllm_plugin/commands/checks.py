# SPDX-License-Identifier: Apache-2.0
"""The checks of ``doctor``: of an installation, and of a model before an engine starts."""

import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, requires, version
from pathlib import Path
from typing import Literal

import torch
import vllm
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pydantic import ValidationError
from vllm import envs
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins
from vllm.utils.cpu_resource_utils import get_memory_node_info, get_visible_memory_node
from vllm.v1.attention.selector import get_attn_backend

from compress_common.checkpoints.folder import CONFIG
from compress_common.errors import CompressError
from quant_methods.formats.source_check import check_source
from vllm_plugin import SUPPORTED_VLLM, why_disabled
from vllm_plugin.commands.common import gib
from vllm_plugin.kv_cache.latent_cpu_build import latent_reader
from vllm_plugin.quantization.config import CONFIGS
from vllm_plugin.quantization.cpu_int4 import resolve_activations
from vllm_plugin.quantization.kernels import kernels, ranges
from vllm_plugin.seams import SEAMS, broken_seams
from vllm_plugin.self_check import layouts, table
from vllm_plugin.settings import Settings, parse_settings

PACKAGE = "vllm-compress-plugin"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        ok: an engine can use it.
        found: one line; what to change, if it is not ok or slow.
        slow: it works, several times slower than it could on this machine.
    """

    name: str
    ok: bool
    found: str
    slow: bool = False

    @property
    def status(self) -> Literal["ok", "slow", "problem"]:
        """One word for it."""
        if not self.ok:
            return "problem"
        return "slow" if self.slow else "ok"


def installation() -> list[Check]:
    """Check what does not depend on a model. Loads the plugin as vLLM does."""
    fits = Version(vllm.__version__).base_version in SpecifierSet(SUPPORTED_VLLM)
    wanted = "" if fits else f"; this plugin was tested with {SUPPORTED_VLLM}, install one of these"
    broken = broken_seams()
    return [
        Check("vLLM", fits, vllm.__version__ + wanted),
        Check("plugin", *_package()),
        Check("VLLM_PLUGINS", *_allowed()),
        Check("plugin loaded", *_loaded()),
        Check("seams", not broken, "; ".join(broken) or f"{len(SEAMS)} as expected"),
        *(Check(f"extra {name}", True, found) for name, found in _extras()),
        _device(),
    ]


def model_checks(args: EngineArgs) -> list[Check]:
    """Check what an engine with these arguments would refuse or choose. Loads no weights."""
    try:
        config = args.create_engine_config()
        settings = parse_settings(config.additional_config)
    except Exception as error:  # vLLM raises many types for what a user got wrong
        damage = None if isinstance(error, CompressError) else _damage(args)
        return [Check("engine arguments", False, damage or _reason(error))]
    return [
        Check("engine arguments", True, f"accepted, {config.model_config.architecture}"),
        *_memory(config),
        Check("block size", True, f"{config.cache_config.block_size} tokens"),
        _guarded("attention", lambda: _attention(config)),
        *(_guarded(f"kernel of {unit}", choose) for unit, choose in kernels(config)),
        *_latents(config, settings),
        *(Check(name, True, found) for name, found in table(config, settings)),
        *(Check(name, True, found) for name, found in _shares(config, settings)),
    ]


def _damage(args: EngineArgs) -> str | None:
    """Say what is wrong with the files of a checkpoint, where vLLM fails before our checks."""
    folder = Path(args.model)
    if (folder / CONFIG).is_file():
        try:
            check_source(folder, None)
        except CompressError as error:
            return str(error)
    return None


def _reason(error: Exception) -> str:
    """What went wrong, without the input and the link that pydantic adds."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())


def _package() -> tuple[bool, str]:
    try:
        number = version(PACKAGE)
    except PackageNotFoundError:
        return False, f"{PACKAGE} is not installed here; pip install it into vLLM's environment"
    found = entry_points(group="vllm.general_plugins", name="compress")
    if not found:
        return False, f"{number}, without its entry point in vllm.general_plugins; install it again"
    return True, f"{number}, {next(iter(found)).value}"


def _allowed() -> tuple[bool, str]:
    allowed = envs.VLLM_PLUGINS
    if allowed is None:
        return True, "not set: all plugins are loaded"
    return "compress" in allowed, (
        ",".join(allowed)
        if "compress" in allowed
        else f"{','.join(allowed)!r} leaves this plugin out; add compress to it, or unset it"
    )


def _loaded() -> tuple[bool, str]:
    try:
        load_general_plugins()
        # Asked first: vLLM does not know the methods of a disabled plugin, and would say only that.
        if reason := why_disabled():
            return False, f"disabled: {reason}"
        known = all(get_quantization_config(kind.method) is kind for kind in CONFIGS)
    except Exception as error:  # whatever a plugin raises ends the engine too
        return False, f"vLLM has not loaded it: {error}"
    wrapped = hasattr(EngineArgs.create_engine_config, "__wrapped__")
    methods = ", ".join(kind.method for kind in CONFIGS)
    return known and wrapped, f"{methods} {'registered' if known and wrapped else 'missing'}"


def _extras() -> Iterator[tuple[str, str]]:
    """Optional extras that users install, and what is missing for each."""
    missing: dict[str, list[str]] = {}
    for requirement in map(Requirement, requires(PACKAGE) or ()):
        if not (extra := re.search(r'extra == "([^"]+)"', str(requirement.marker))):
            continue
        if extra[1] in ("test", "dev"):
            continue
        names = missing.setdefault(extra[1], [])
        try:
            if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                names.append(str(requirement).partition(";")[0].strip())
        except PackageNotFoundError:
            names.append(requirement.name)
    for wanted, names in missing.items():
        yield wanted, f"absent, optional: lacks {', '.join(names)}" if names else "present"


def _device() -> Check:
    if current_platform.is_cpu():
        kind, vectors = platform.machine(), torch.backends.cpu.get_cpu_capability()
        found = f"{kind} CPU, {vectors}, int4 with {resolve_activations()} activations"
        slow = kind == "x86_64" and vectors != "AVX512"
        if slow:
            found += (
                "; without AVX-512, prompts in bfloat16 take about ten times as long: --dtype "
                "float32 serves faster where memory allows. Calibration computes in float32 where "
                "that fits half of the memory"
            )
        return Check("device", True, found, slow=slow)
    name = str(current_platform.device_name)
    supported = current_platform.is_cuda()
    return Check("device", supported, name if supported else f"{name}: runs on CPU and CUDA only")


def _memory(config: VllmConfig) -> Iterator[Check]:
    """Whether a CPU engine finds as much free memory as it asks for before it loads anything."""
    cache = config.cache_config
    if not current_platform.is_cpu() or cache.kv_cache_memory_bytes is not None:
        return
    memory = get_memory_node_info(get_visible_memory_node()[0])
    share = cache.gpu_memory_utilization
    enough = share * memory.total_memory <= memory.available_memory
    found = f"{gib(memory.available_memory)} of {gib(memory.total_memory)} are free"
    if not enough:
        found += (
            f", less than --gpu-memory-utilization {share}: vLLM would not start; lower it, or set "
            "VLLM_CPU_KVCACHE_SPACE to the GiB that the KV cache may take"
        )
    yield Check("memory", enough, found)


def _guarded(name: str, step: Callable[[], str]) -> Check:
    try:
        return Check(name, True, step())
    except Exception as error:  # as the engine would meet it
        return Check(name, False, str(error))


def _attention(config: VllmConfig) -> str:
    if (chosen := config.attention_config.backend) is not None:
        return chosen.name
    model = config.model_config
    with set_current_vllm_config(config):
        backend = get_attn_backend(
            model.get_head_size(), model.dtype, config.cache_config.cache_dtype
        )
    return str(backend.get_name())


def _latents(config: VllmConfig, settings: Settings) -> Iterator[Check]:
    """What reads latents on a CPU; compiles the kernel."""
    if settings.kv is not None and settings.kv.latents and current_platform.is_cpu():
        reader = latent_reader(config.model_config.dtype)
        yield Check("latents", True, reader.text, slow=reader.status == "slow")


def _shares(config: VllmConfig, settings: Settings) -> Iterator[tuple[str, str]]:
    """What is kept of the KV cache, and the layers that keep it."""
    chosen = layouts(config, settings) or {}
    layers: dict[str, list[int]] = {}
    for layer, layout in chosen.items():
        layers.setdefault(str(layout), []).append(layer)
    for kept, indices in sorted(layers.items()):
        yield kept, f"layer{'s' if len(indices) > 1 else ''} {ranges(indices)}"
