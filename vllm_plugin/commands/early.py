# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-compress serve`` refuses within seconds, before vLLM is imported.

These checks read the command line, the files that it names, and the port. They refuse only what
vLLM's parser or an engine refuses too. Where only these can tell, nothing is said here.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress_common.checkpoints.folder import CONFIG, read_config
from vllm_plugin.command_line import (
    NO_MODEL,
    additional_config_of,
    file_problems,
    flag_values,
    json_beside_preset,
    mixed_forms,
    model_of,
    name_problems,
    overridden,
)
from vllm_plugin.commands.address import Address
from vllm_plugin.commands.common import Problems, json_object
from vllm_plugin.presets import Preset, content

_PORT = 8000  # vLLM's default
_OTHER_CONFIG = {"--hf-config-path", "--config-format", "--load-format"}
_MISTRAL_CONFIG = "params.json"  # of Mistral's own format, which vLLM reads too


def refuse_early(given: Sequence[str], arguments: Sequence[str], preset: Preset | None) -> None:
    """Refuse a command line that cannot start a server. Imports neither torch nor vLLM.

    Args:
        given: what the user wrote behind the command, without options of our own.
        arguments: the same with the flags of the preset.
        preset: if one was chosen.

    Raises:
        CompressError: lists every problem found.
    """
    problems = Problems()
    mixed = mixed_forms(given)
    if preset:
        mixed = overridden(given, content(preset)) or mixed or json_beside_preset(given, preset)
    problems.found += file_problems(given) + mixed
    values = flag_values(arguments)
    config = values.get("--additional-config")
    if isinstance(config, str):
        problems.collect(lambda: json_object("--additional-config", config))
    problems.found += _address_problems(values)
    model = model_of(given)
    if model is not None:
        problems.found += name_problems(model)
        problems.collect(lambda: _check_config(Path(model).expanduser(), values))
    elif all(word.startswith("-") for word in given) and not problems.found:
        problems.found.append(NO_MODEL)
    problems.raise_found()


def refuse_settings(arguments: Sequence[str]) -> None:
    """Refuse settings of compression that suit no engine, and damaged folders. Imports torch.

    Args:
        arguments: all flags, which ``refuse_early`` has passed.

    Raises:
        CompressError: lists every problem found.
    """
    from kv_policies.budget import profile
    from kv_policies.latents.bases import Bases
    from quant_methods.formats.source_check import check_source
    from quant_methods.registry import served_methods
    from vllm_plugin.commands.missing import lacks_bases, whole
    from vllm_plugin.settings import method_problems, parse_settings

    config = additional_config_of(arguments)
    if config is None:
        return
    if lacks_bases(config):
        config = whole(config)
    problems = Problems()
    settings = problems.collect(lambda: parse_settings(config))
    if settings is not None and settings.kv is not None:
        kv = settings.kv
        if kv.keeps_latents and kv.bases is not None:
            problems.collect(lambda: Bases.load(str(kv.bases)))
        if kv.profile is not None:
            problems.collect(lambda: profile.load(str(kv.profile)))
    values = flag_values(arguments)
    method = str(values.get("--quantization"))
    problems.found += method_problems(config, method)
    model = model_of(arguments)
    if model is not None and not values.keys() & _OTHER_CONFIG:
        folder = Path(model).expanduser()
        ours = method if method in {each.name for each in served_methods()} else None
        if (folder / CONFIG).is_file():
            problems.collect(lambda: check_source(folder, ours))
    problems.raise_found()


def _check_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Refuse a folder without a config. The flags can name one that lies elsewhere."""
    if not folder.is_dir() or values.keys() & _OTHER_CONFIG:
        return
    if (folder / CONFIG).is_file() or not (folder / _MISTRAL_CONFIG).is_file():
        read_config(folder)


def _address_problems(values: Mapping[str, Any]) -> list[str]:
    if values.get("--headless", False) is not False:  # listens nowhere
        return []
    port = values.get("--port", _PORT)
    try:
        number = int(port)
    except (TypeError, ValueError):
        return [f"--port {port!r} is not a number"]
    secure, host = bool(values.get("--ssl-certfile")), values.get("--host")
    address = Address(None if host is None else str(host), number, secure, values.get("--uds"))
    problem = address.problem()
    return [problem] if problem else []
