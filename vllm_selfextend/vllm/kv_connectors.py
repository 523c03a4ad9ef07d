"""Keys that leave a process say what they are.

How a key lies in a slot depends on how a kernel set lays out a block, and what it is, past the first layer, on every
number that changes what queries see; not on the served length. vLLM's KV connectors know none of it: files and stores
go by a hash of the tokens and the model's name, and so do the handshakes of peers
(`vllm/v1/kv_offload/file_mapper.py`, `vllm/distributed/kv_transfer/kv_connector/v1/`). So a connector is given a config
whose model name says all of it, and finds nothing of other numbers or another layout, nor of stock vLLM.
"""

import copy
import functools
from collections.abc import Iterator
from typing import Any

from vllm.config import KVTransferConfig, ModelConfig, VllmConfig
from vllm.logger import init_logger

from ..backends import load_kernels
from ..method.plan import has_plan, read_plan
from ..method.positions import SIGNIFICANT_BITS, auto_reach
from ..method.rope import rope_parameters

logger = init_logger("vllm.self_extend")

GOES_BY_MODEL_NAME = (
    "OffloadingConnector",
    "SimpleCPUOffloadConnector",
    "NixlConnector",
    "NixlPullConnector",
    "NixlPushConnector",
    "MooncakeStoreConnector",
    "LMCacheConnectorV1",
    "LMCacheMPConnector",
    "DecodeBenchConnector",
)
"""Connectors that keep what they hold apart by the model's name, or give none of it to another process."""

GOES_BY_TOKENS = "ExampleConnector"
"""It keeps files by their tokens alone, in a folder of the user's: a folder in it keeps the layouts apart."""


HOLDS_OTHERS = "MultiConnector"
"""It builds other connectors from its config, each with a copy of vLLM's that is the same but for its own settings."""


def check_connector(vllm_config: VllmConfig) -> None:
    """Say which connectors cannot be told what the keys are."""
    settings: KVTransferConfig = vllm_config.kv_transfer_config
    for connector in _connectors(settings.kv_connector, settings.kv_connector_extra_config):
        if connector not in (*GOES_BY_MODEL_NAME, GOES_BY_TOKENS):
            logger.warning(
                "Self-Extend cannot tell whether %s keeps keys of other layouts apart. Whatever shares keys with this "
                "server must have the layout %s too; nothing else, nor stock vLLM, may use the same store or be its "
                "peer.",
                connector,
                cache_layout(vllm_config),
            )


def _connectors(connector: str | None, extra: dict[str, Any]) -> Iterator[str | None]:
    """The connector of that name, or those that it holds."""
    if connector != HOLDS_OTHERS:
        yield connector
        return
    for child in extra.get("connectors") or ():
        yield from _connectors(child.get("kv_connector"), child.get("kv_connector_extra_config") or {})


def cache_layout(vllm_config: VllmConfig) -> str:
    """What has to be equal for one engine to read what another stored: a name for it, fit for files."""
    plan = read_plan(vllm_config)
    rule = f"auto{auto_reach(plan.trained_length)}s{SIGNIFICANT_BITS}"
    group_size = rule if plan.group_size == "auto" else plan.group_size
    numbers = f"g{group_size}-w{plan.neighbor_window}-l{plan.trained_length}"
    switches = f"exact{plan.exact_len}-log{plan.log_scale_len}"
    rotation = "".join(f"{factors}-" for factors in _longrope_factors(vllm_config.model_config))
    return f"self_extend-{numbers}-{switches}-{rotation}{load_kernels(plan.kernel).CACHE_LAYOUT}-{_dtype(vllm_config)}"


def _dtype(vllm_config: VllmConfig) -> str:
    """Of what lies in the cache. Not every connector keeps that apart: `ExampleConnector` and LMCache do not."""
    dtype = str(vllm_config.cache_config.cache_dtype)
    if dtype == "auto":
        dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    return "fp8_e4m3" if dtype == "fp8" else dtype


def _longrope_factors(model_config: ModelConfig) -> set[str]:
    """Of longrope vLLM takes the long factors for all tokens as soon as it serves more than the original length."""
    return {
        "long" if model_config.max_model_len > rope["original_max_position_embeddings"] else "short"
        for rope in rope_parameters(model_config.hf_text_config)
        if rope.get("rope_type") == "longrope"
    }


def tell_layout(original: Any) -> Any:
    """Wrap `KVConnectorFactory.create_connector`: every connector of an engine of ours learns the layout."""

    @functools.wraps(original.__func__)
    def create_connector(cls: Any, config: VllmConfig, *args: Any, **kwargs: Any) -> Any:
        told = with_layout(config) if has_plan(config) else config
        return original.__get__(None, cls)(told, *args, **kwargs)

    return classmethod(create_connector)


def with_layout(vllm_config: VllmConfig) -> VllmConfig:
    """A copy that differs in the model's name and, for `GOES_BY_TOKENS`, in the folder."""
    layout = cache_layout(vllm_config)
    told = copy.copy(vllm_config)
    told.model_config = copy.copy(vllm_config.model_config)
    # Mooncake takes what is behind the last slash.
    told.model_config.model = f"{vllm_config.model_config.model.rstrip('/')}+{layout}"
    if vllm_config.kv_transfer_config is not None:
        told.kv_transfer_config = copy.copy(vllm_config.kv_transfer_config)
        told.kv_transfer_config.kv_connector_extra_config = _in_its_folder(
            told.kv_transfer_config.kv_connector, told.kv_transfer_config.kv_connector_extra_config, layout
        )
    return told


def _in_its_folder(connector: str | None, extra: dict[str, Any], layout: str) -> dict[str, Any]:
    """A connector's settings, with a folder for the layout where it goes by tokens."""
    if connector == GOES_BY_TOKENS:
        return extra | {"shared_storage_path": f"{extra.get('shared_storage_path', '/tmp')}/{layout}"}
    if connector != HOLDS_OTHERS:
        return extra
    told = []
    for child in extra.get("connectors") or ():
        settings = _in_its_folder(child.get("kv_connector"), child.get("kv_connector_extra_config") or {}, layout)
        told.append(child | {"kv_connector_extra_config": settings})
    return extra | {"connectors": told}
