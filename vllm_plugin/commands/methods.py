# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress methods``: what is registered."""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from vllm_plugin.commands.common import AsJson, out, serve_command


def list_methods(as_json: AsJson = False) -> None:
    """List what is registered, with settings: weights, depth, KV and diffusion."""
    from depth_pruning.healers.registry import healers
    from depth_pruning.searches.registry import searches as depth_searches
    from dllm_denoising.registry import policies as diffusion_policies
    from dllm_denoising.settings import Decoding
    from kv_policies.registry import policies
    from quant_methods.allocators.registry import allocators
    from quant_methods.registry import methods
    from vllm_plugin.settings import KVSettings, WeightSettings

    weights: dict[str, dict[str, Any]] = {
        name: {
            "at_load": kind.capabilities.at_load,
            "calibrates": kind.capabilities.calibrates,
            "formats": list(kind.capabilities.formats),
            "paper": kind.capabilities.paper,
            "settings": _settings(kind.settings_type),
        }
        for name, kind in sorted(methods().items())
    }
    searches: dict[str, dict[str, Any]] = {
        name: {
            "search_tokens": kind.settings_type().search_tokens(),  # with the default settings
            "needs": kind.needs,
            "paper": kind.paper,
            "settings": _settings(kind.settings_type),
        }
        for name, kind in sorted(allocators().items())
    }
    of_depth: dict[str, dict[str, Any]] = {"search": depth_searches(), "heal": healers()}
    depth: dict[str, dict[str, dict[str, Any]]] = {
        noun: {
            name: {"paper": kind.paper, "settings": _settings(kind.settings_type)}
            for name, kind in sorted(found.items())
        }
        for noun, found in of_depth.items()
    }
    kv: dict[str, dict[str, Any]] = {
        name: {
            "needs_profile": kind.capabilities.needs_profile,
            "per_head": kind.capabilities.per_head,
            "needs_queries": kind.capabilities.needs_queries,
            "content": kind.capabilities.content,
            "paper": kind.capabilities.paper,
            "settings": _settings(kind.settings_type),
        }
        for name, kind in sorted(policies().items())
    }
    diffusion: dict[str, dict[str, Any]] = {
        name: {
            "blocks_only": kind.blocks_only,
            "paper": kind.paper,
            "settings": _settings(kind.settings_type),
        }
        for name, kind in sorted(diffusion_policies().items())
    }
    common = {
        "weights": _settings(WeightSettings),
        "kv": _settings(KVSettings, "policy"),
        "diffusion": _settings(Decoding),
    }
    if as_json:
        found = {"weights": weights, "allocators": searches, "depth": depth}
        found |= {"kv": kv, "diffusion": diffusion}
        print(json.dumps(found | {"common": common}, default=str))
        return
    _print("[bold underline]weights[/]  vllm serve MODEL --quantization NAME")
    _print("  of every method, in compress.weights:")
    _print_settings(common["weights"], '"{}": {}')
    for name, row in weights.items():
        where = "while loading and offline" if row["at_load"] else "offline only"
        _print(f"[bold]{name}[/]  {row['paper']}")
        _print(
            f"  {where}; formats: {', '.join(row['formats'])}; "
            f"calibration: {'yes' if row['calibrates'] else 'none'}"
        )
        _print_settings(row["settings"], "--set {}={}")
    _print("\n[bold underline]allocators[/]  vllm-compress search MODEL --method NAME")
    for name, row in searches.items():
        _print(f"[bold]{name}[/]  {row['paper']}")
        _print(
            f"  needs the level database, {row['search_tokens']} or more tokens of search text, "
            f"and {row['needs']}"
        )
        _print_settings(row["settings"], "--set {}={}")
    for noun, form in (("search", "--set {}={}"), ("heal", "--set heal.{}={}")):
        _print(f"\n[bold underline]depth[/]  vllm-compress prune MODEL --drop 4 --{noun} NAME")
        for name, row in depth[noun].items():
            _print(f"[bold]{name}[/]  {row['paper']}")
            _print_settings(row["settings"], form)
    example = serve_command("MODEL", policy="NAME", keep=0.25)
    _print(f"\n[bold underline]KV cache[/]  {example}")
    _print("  of every policy:")
    _print_settings(common["kv"], '"{}": {}')
    for name, row in kv.items():
        _print(f"[bold]{name}[/]  {row['paper']}")
        if row["content"] == "latents":
            _print("  keeps every token as a latent; bases from `vllm-compress calibrate-kv`")
            _print_settings(row["settings"], '"{}": {}')
            continue
        shares = "from `vllm-compress profile`" if row["needs_profile"] else "equal, or a profile's"
        _print(
            f"  shares of layers: {shares}; tokens chosen per "
            f"{'KV head' if row['per_head'] else 'layer'}, by "
            f"{'attention' if row['needs_queries'] else 'keys or positions'}"
        )
        _print_settings(row["settings"], '"{}": {}')
    example = json.dumps({"compress": {"diffusion": {"policy": "NAME", "threshold": 0.9}}})
    _print(f"\n[bold underline]Diffusion[/]  vllm serve MODEL --additional-config '{example}'")
    _print("  of every policy:")
    _print_settings(common["diffusion"], '"{}": {}')
    for name, row in diffusion.items():
        _print(f"[bold]{name}[/]  {row['paper']}")
        if row["blocks_only"]:
            _print("  works on blocks: block_length, not window_length")
        _print_settings(row["settings"], '"{}": {}')


def _settings(kind: type[BaseModel], *without: str) -> dict[str, dict[str, Any]]:
    return {
        key: {
            "default": field.get_default(call_default_factory=True),
            "description": field.description,
        }
        for key, field in kind.model_fields.items()
        if key not in without
    }


def _print_settings(settings: Mapping[str, Mapping[str, Any]], form: str) -> None:
    for key, setting in settings.items():
        typed = form.format(key, json.dumps(setting["default"], default=str))
        _print(f"  {typed}  [dim]{setting['description']}[/]")


def _print(line: str) -> None:
    out.print(line, highlight=False, soft_wrap=True)
