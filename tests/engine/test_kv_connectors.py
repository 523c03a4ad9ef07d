"""Keys that leave the process: never read by an engine that stores them otherwise, read by one that stores them so."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import LLM
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import compute_nixl_compatibility_hash
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.kv_offload.file_mapper import FileMapper

from tests.support.models import random_prompts
from vllm_selfextend.method.positions import GroupSize
from vllm_selfextend.vllm import kv_connectors
from vllm_selfextend.vllm.binding import change_numbers
from vllm_selfextend.vllm.kv_connectors import cache_layout, with_layout

SAMPLING = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, detokenize=False)
(PROMPT,) = random_prompts([200], seed=8)


def extended(group_size: GroupSize, **settings: Any) -> dict[str, Any]:
    numbers = {"group_size": group_size, "neighbor_window": 16, **settings}
    return {"attention_backend": "CUSTOM", "max_model_len": 256, "additional_config": {"self_extend": numbers}}


def through(connector: str, **extra: Any) -> dict[str, Any]:
    return {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": extra}


def answer(llm: LLM) -> list[int]:
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, SAMPLING, use_tqdm=False)
    return list(output.outputs[0].token_ids)


def test_files_are_read_by_the_same_layout_only(
    checkpoint: Callable, start_engine: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ExampleConnector keeps a folder by the tokens alone, which any engine takes for its own."""
    from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector

    found: list[int] = []
    original = ExampleConnector.get_num_new_matched_tokens

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        found.append(result[0])
        return result

    monkeypatch.setattr(ExampleConnector, "get_num_new_matched_tokens", counted)
    model = checkpoint("llama")
    # The unmodified model reads as far as the others if its config says so: RoPE needs no weights.
    stock = {"max_model_len": 256, "hf_overrides": {"max_position_embeddings": 256}}
    engines = {
        "auto": extended("auto"),
        "G 6": extended(6),
        "W 24": extended("auto", neighbor_window=24),
        "reference": extended("auto", kernel="reference"),
        "stock": stock,
    }
    expected = {}
    for name, settings in engines.items():
        expected[name] = answer(start_engine(model, **settings, enable_prefix_caching=False))
    assert all(expected["auto"] != expected[name] for name in ("G 6", "W 24", "stock"))
    assert expected["G 6"] != expected["stock"]

    connector = through("ExampleConnector", shared_storage_path=str(tmp_path))

    def run(name: str) -> int:
        found.clear()
        llm = start_engine(model, **engines[name], kv_transfer_config=connector, enable_prefix_caching=False)
        assert answer(llm) == expected[name]
        return max(found)

    for name in engines:
        assert run(name) == 0, f"{name} took what another engine stored"
    for name in engines:
        assert run(name) > 0, f"{name} did not find what it stored itself"
    engines["auto"]["max_model_len"] = 1024
    assert run("auto") > 0, "a server of another length did not find it"


def configure(checkpoint: Callable, connector: str | dict[str, Any], **settings: Any) -> Any:
    config = through(connector) if isinstance(connector, str) else connector
    settings = {"dtype": "float32", **settings}
    return EngineArgs(checkpoint("llama"), kv_transfer_config=config, **settings).create_engine_config()


def test_what_connectors_go_by(checkpoint: Callable, tmp_path: Path) -> None:
    """The offloading connector's files and NIXL's handshake. (Neither moves keys of a CPU: vLLM asserts a GPU's.)"""

    def keys(group_size: int) -> tuple[str, str]:
        told = with_layout(configure(checkpoint, "OffloadingConnector", **extended(group_size)))
        told.cache_config.block_size = 16
        spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
        cache = KVCacheConfig(8, [], [KVCacheGroupSpec(["model.layers.0.self_attn.attn"], spec)])
        offloading = SimpleNamespace(config=build_offloading_config(told, cache))
        files = FileMapper.from_offloading_spec(str(tmp_path), offloading)
        return files.base_path, compute_nixl_compatibility_hash(told, "CUSTOM")

    first, again, other = keys(6), keys(6), keys(12)
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]


def test_servers_of_other_lengths_share(checkpoint: Callable) -> None:
    """What a key is follows from the tokens and from the numbers."""

    def name(max_model_len: int, **numbers: Any) -> str:
        settings = {**extended(6), "max_model_len": max_model_len, "additional_config": {"self_extend": numbers}}
        return cache_layout(configure(checkpoint, "OffloadingConnector", **settings))

    assert name(128) == name(256) == name(1024) == "self_extend-gauto42s4-w16-l64-exact64-log64-cpu-2-float32"
    assert name(128, group_size=8) == name(256, group_size=8) != name(256)


def test_a_connector_that_cannot_be_told_is_named(checkpoint: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(kv_connectors.logger, "warning", lambda text, *args: said.append(text % args))
    configure(checkpoint, "OffloadingConnector", **extended(6))
    assert said == []
    configure(checkpoint, "MooncakeConnector", **extended(6))
    assert "MooncakeConnector" in said[0]
    assert "self_extend-g6-w16-l64-exact64-log64-cpu-2-float32" in said[0]


def test_connectors_in_a_connector(checkpoint: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MultiConnector builds them from its config, each with a config of its own, and not as vLLM builds the first."""
    said: list[str] = []
    monkeypatch.setattr(kv_connectors.logger, "warning", lambda text, *args: said.append(text % args))
    inner = through("MultiConnector", connectors=[through("ExampleConnector", shared_storage_path=str(tmp_path))])
    several = through(
        "MultiConnector", connectors=[through("OffloadingConnector"), through("MooncakeConnector"), inner]
    )
    config = configure(checkpoint, several, **extended(6))
    layout = cache_layout(config)
    assert [line.split(" keeps keys")[0].split()[-1] for line in said] == ["MooncakeConnector"]
    told = with_layout(config)
    children = MultiConnector._get_connector_classes_and_configs(told)
    assert [child.model_config.model.endswith(layout) for _, child in children] == [True] * 3
    ((_, files),) = MultiConnector._get_connector_classes_and_configs(children[-1][1])
    assert files.model_config.model.endswith(layout)
    assert files.kv_transfer_config.get_from_extra_config("shared_storage_path", "") == f"{tmp_path}/{layout}"
    # The user's config is as it was.
    assert config.kv_transfer_config.kv_connector_extra_config == several["kv_connector_extra_config"]
    assert inner["kv_connector_extra_config"]["connectors"][0]["kv_connector_extra_config"] == {
        "shared_storage_path": str(tmp_path)
    }


def test_every_number_that_changes_keys_is_in_the_name(checkpoint: Callable) -> None:
    """Past the first layer keys depend on what queries before saw, so on all of them."""
    changes = ({}, {"neighbor_window": 24}, {"trained_length": 60}, {"exact_short": False}, {"log_scale": False})
    configs = [configure(checkpoint, "OffloadingConnector", **extended(6, **change)) for change in changes]
    assert len({cache_layout(config) for config in configs}) == len(changes)


def test_the_type_that_keys_are_kept_in_is_in_the_name(checkpoint: Callable) -> None:
    """Not every connector knows it."""
    changes = ({}, {"dtype": "bfloat16"}, {"kv_cache_dtype": "fp8"})
    names = [cache_layout(configure(checkpoint, "ExampleConnector", **extended(6), **change)) for change in changes]
    assert [name.rpartition("-")[2] for name in names] == ["float32", "bfloat16", "fp8_e4m3"]


def test_the_factors_of_longrope_are_in_the_name(checkpoint: Callable) -> None:
    """They change all keys once a server is longer than the original length."""

    def name(max_model_len: int) -> str:
        settings = {"attention_backend": "CUSTOM", "kv_transfer_config": through("OffloadingConnector")}
        args = EngineArgs(checkpoint("longrope"), dtype="float32", max_model_len=max_model_len, **settings)
        return cache_layout(args.create_engine_config())

    assert name(128) == name(256)
    assert "-long-" in name(128)
    assert "-short-" in name(32)


def test_numbers_do_not_change_below_a_connector(checkpoint: Callable) -> None:
    vllm_config = configure(checkpoint, "OffloadingConnector", **extended(6), enforce_eager=True)
    with pytest.raises(RuntimeError, match="whose keys leave it through a KV connector cannot be changed"):
        change_numbers(None, vllm_config, 12, 16)
