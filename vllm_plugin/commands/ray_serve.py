# SPDX-License-Identifier: Apache-2.0
"""``vllm-compress ray-serve``: a compressed model behind Ray Serve."""

import os
import signal
import threading
from typing import Annotated, Literal

import typer

from compress_common.errors import CompressError
from vllm_plugin.commands.common import (
    AdditionalConfig,
    Model,
    Policy,
    Quantization,
    err,
    json_object,
)


def ray_serve(
    model: Model,
    model_id: Annotated[
        str | None, typer.Option(help="what clients name (default: the folder's name or hub id)")
    ] = None,
    quantization: Quantization = None,
    policy: Policy = None,
    keep: Annotated[
        float | None, typer.Option(help="share of the KV cache that stays, above 0, up to 1")
    ] = None,
    additional_config: AdditionalConfig = "{}",
    engine_kwargs: Annotated[
        str, typer.Option(help='other engine arguments, JSON: {"max_model_len": 4096}')
    ] = "{}",
    replicas: Annotated[
        str,
        typer.Option(help="engines: a number or FEWEST:MOST; prompts follow their prefix"),
    ] = "1",
    target_requests: Annotated[
        int, typer.Option(help="running requests per engine above which Ray starts another")
    ] = 32,
    tensor_parallel_size: Annotated[int, typer.Option(help="ranks of each engine")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu")] = "auto",
    cpus: Annotated[int, typer.Option(help="cores per rank, where engines run on a CPU")] = 1,
    host: Annotated[str, typer.Option(help="address of the HTTP server")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port of the HTTP server")] = 8000,
    metrics_port: Annotated[
        int, typer.Option(help="port of Ray's metrics, ray_vllm_...; of a new cluster only")
    ] = 8080,
) -> None:
    """Serve a compressed model with Ray Serve until Ctrl-C.

    Connects to the cluster that RAY_ADDRESS names, or else starts one on this machine. Only the
    HTTP server listens on --host alone. Ray's own ports listen on every interface: protect them.

    Example: vllm-compress ray-serve MODEL --quantization smoothquant_plus --policy snap_kv
    --keep 0.25
    """
    from vllm_plugin.serving import llm_config
    from vllm_plugin.serving.cluster import running_app
    from vllm_plugin.settings import KEY

    others = json_object("--additional-config", additional_config)
    section = others.pop(KEY, {})
    if not isinstance(section, dict):
        raise CompressError(f"--additional-config {KEY} must be an object, got {section!r}")
    if policy is None and keep is not None:
        raise CompressError("--keep needs --policy; `vllm-compress methods` lists them")
    if policy is not None:
        if "kv" in section:
            raise CompressError(f"give --policy or {KEY}.kv of --additional-config, not both")
        section = section | {"kv": {"policy": policy} | ({} if keep is None else {"keep": keep})}
    arguments = json_object("--engine-kwargs", engine_kwargs)
    if others:
        arguments["additional_config"] = others | arguments.get("additional_config", {})
    least, most = _pair(replicas)
    if device not in ("auto", "cpu", "gpu"):
        raise CompressError(f"--device {device!r} is none of auto, cpu, gpu")
    chosen: Literal["auto", "cpu", "gpu"] = device  # type: ignore[assignment]
    config = llm_config(
        model,
        model_id=model_id,
        quantization=quantization,
        compress=section,
        device=chosen,
        tensor_parallel_size=tensor_parallel_size,
        replicas=(least, most),
        target_requests=target_requests,
        cpus=cpus,
        engine_kwargs=arguments,
    )
    try:
        with running_app(config, host=host, port=port, metrics_port=metrics_port):
            err.print(f"serving {config.model_id} on http://{host}:{port}/v1", highlight=False)
            if not os.environ.get("RAY_ADDRESS"):
                err.print(f"metrics on http://{host}:{metrics_port}/metrics", highlight=False)
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # ray.init has set its own
            threading.Event().wait()
    except KeyboardInterrupt:
        err.print("stopped")


def _pair(text: str) -> tuple[int, int]:
    """Return ``2`` as (2, 2) and ``1:4`` as (1, 4)."""
    least, _, most = text.partition(":")
    try:
        return int(least), int(most or least)
    except ValueError:
        raise CompressError(
            f"--replicas {text!r} is neither a number nor FEWEST:MOST, such as 1:4"
        ) from None
