"""What cannot work is refused at start-up, in words that name the model, the reason and what to do."""

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from vllm import LLM
from vllm.config import VllmConfig
from vllm.config.speculative import SpeculativeMethod
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.prefill_prefix_lm_attention import PrefillPrefixLMAttention
from vllm.model_executor.models import llama
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

import vllm_selfextend.backends as backends
from tests.support.models import SHAPE, SLIDING
from vllm_selfextend.method.plan import read_plan
from vllm_selfextend.method.rope import inverse_frequencies
from vllm_selfextend.vllm import engine_args, plugin, rotary_modules, support
from vllm_selfextend.vllm.report import plan_report
from vllm_selfextend.vllm.support import unsupported_reason

LLAMA = {**SHAPE, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32"}


def configure(folder: Path, config: dict[str, Any], **settings: Any) -> Any:
    """Configure an engine with CUSTOM for a checkpoint of which only the config exists."""
    (folder / "config.json").write_text(json.dumps(config))
    arguments = {"attention_backend": "CUSTOM", "max_model_len": 512, "skip_tokenizer_init": True, **settings}
    return EngineArgs(str(folder), **arguments).create_engine_config()


REFUSED = {
    "dynamic NTK": (
        {
            **LLAMA,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            "max_position_embeddings": 32,
        },
        r"its RoPE is 'dynamic' \(dynamic NTK\): the frequencies move with the length",
    ),
    "M-RoPE": (
        {
            "model_type": "qwen2_vl",
            "architectures": ["Qwen2VLForConditionalGeneration"],
            "text_config": {
                **SHAPE,
                "model_type": "qwen2_vl_text",
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
            },
        },
        r"its RoPE has several position axes \(M-RoPE\).*To serve texts alone, .*: --language-model-only",
    ),
    "ALiBi": (
        {
            "model_type": "bloom",
            "architectures": ["BloomForCausalLM"],
            "hidden_size": 64,
            "n_head": 2,
            "n_layer": 2,
            "seq_length": 64,
        },
        "it uses ALiBi; Self-Extend needs rotary position embeddings",
    ),
    "no RoPE": (
        {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "n_positions": 64,
            "n_embd": 64,
            "n_head": 2,
            "n_layer": 2,
        },
        r"its config names no rotary position embeddings \(RoPE\)",
    ),
    "MLA": (
        {
            "model_type": "deepseek_v2",
            "architectures": ["DeepseekV2ForCausalLM"],
            "max_position_embeddings": 64,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        },
        r"it uses multi-head latent attention \(MLA\)",
    ),
    "head sizes that the kernels do not take": (
        {**LLAMA, "head_dim": 24},
        "its heads have 24 dimensions, which the cpu kernels do not take: they take multiples of 16 up to 512.*'refer",
    ),
    "every layer slides": (
        {**SHAPE, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 32},
        "every layer attends to a sliding window of 32 tokens.*Add --disable-sliding-window",
    ),
}


BOTH_WAYS = r"its tokens attend to those after them, too \(an encoder, or is_causal is false"
REFUSED |= {
    "no causal attention": ({**LLAMA, "is_causal": False}, BOTH_WAYS),
    "an encoder with RoPE": (
        {
            **SHAPE,
            "model_type": "modernbert",
            "architectures": ["ModernBertModel"],
            "local_attention": 16,
            "cls_token_id": 0,
            "sep_token_id": 1,
        },
        BOTH_WAYS,
    ),
    "numbers that are none": (
        {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}},
        "its RoPE of type 'default' has rope_theta '1e4' in the config",
    ),
}


def test_a_length_past_the_checkpoints_needs_a_model_that_can_be_extended_grouped_or_not(tmp_path: Path) -> None:
    """Its tables have to be lengthened where the user's trained length leaves nothing to group."""
    config, message = REFUSED["dynamic NTK"]
    with pytest.raises(ValueError, match=message):
        configure(tmp_path, config, additional_config={"self_extend": {"trained_length": 512}})
    plan = read_plan(configure(tmp_path, config, max_model_len=64))
    assert not plan.groups, "within what vLLM derives, it is served as by stock vLLM"


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_work(case: str, tmp_path: Path) -> None:
    config, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"Self-Extend cannot serve {tmp_path}: {message}") as refused:
        configure(tmp_path, config)
    report = plan_report(str(tmp_path), 512, {})
    assert not report.supported
    assert str(refused.value) == f"Self-Extend cannot serve {tmp_path}: {report.why_not}", "plan says the same"


SERVED = {
    "llama": (LLAMA, {}),
    "no kernels for heads of 24 but PyTorch's": ({**LLAMA, "head_dim": 24}, {"kernel": "reference"}),
    "some layers slide": (
        {**SHAPE, **SLIDING, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "dtype": "float32"},
        {},
    ),
}


@pytest.mark.parametrize("case", SERVED)
def test_models_that_work(case: str, tmp_path: Path) -> None:
    config, settings = SERVED[case]
    chosen = read_plan(configure(tmp_path, config, additional_config={"self_extend": settings}))
    report = plan_report(str(tmp_path), 512, settings)
    assert (report.supported, report.why_not) == (True, None)
    assert (report.group_size, report.neighbor_window) == (chosen.group_size, chosen.neighbor_window)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"worker_cls": "my.Worker"}, "the worker class is my.Worker"),
        ({"tensor_parallel_size": 4, "decode_context_parallel_size": 2}, "context parallelism splits the positions"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype not supported"),
        ({"block_size": 8}, "block_size not supported"),
        ({"max_num_batched_tokens": 1, "enable_chunked_prefill": False}, "max_num_batched_tokens"),
    ],
)
def test_plan_refuses_the_arguments_that_start_up_refuses(arguments: dict, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    report = plan_report(str(tmp_path), 512, {}, arguments)
    assert not report.supported
    assert said in report.why_not
    assert (report.kv_bytes_per_token, report.kv_bytes_per_sequence) == (None, None)


def test_code_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setattr(llama.LlamaModel, "__init__", lambda *args, **kwargs: {}["nothing"])
    assert "vLLM's code for it fails here with KeyError: 'nothing'" in plan_report(str(tmp_path), 512, {}).why_not
    monkeypatch.setattr(llama.LlamaModel, "__init__", lambda *args, **kwargs: os._exit(3))
    assert "ends the process that makes the model" in plan_report(str(tmp_path), 512, {}).why_not


def test_context_parallelism(tmp_path: Path) -> None:
    parallel = {"tensor_parallel_size": 4, "decode_context_parallel_size": 2, "distributed_executor_backend": "mp"}
    with pytest.raises(ValueError, match=r"context parallelism splits the positions.*context parallel size to 1"):
        configure(tmp_path, LLAMA, **parallel)


def test_drafts_that_write_the_cache_themselves(tmp_path: Path) -> None:
    vllm_config = configure(tmp_path, LLAMA)
    reason = unsupported_reason(
        read_plan(vllm_config),
        vllm_config.model_config,
        torch.device("cpu"),
        parallel_config=vllm_config.parallel_config,
        speculative_config=SimpleNamespace(method="dflash"),
    )
    assert reason is not None
    assert "the drafts of speculative method 'dflash' write the cache themselves" in reason


def draft_model(folder: Path, config: dict[str, Any], method: str = "draft_model") -> dict[str, Any]:
    """Speculation with a draft model or head of which only the config exists."""
    (folder / "draft").mkdir(exist_ok=True)
    (folder / "draft" / "config.json").write_text(json.dumps(config))
    return {"method": method, "model": str(folder / "draft"), "num_speculative_tokens": 2}


DRAFTS = {
    "draft_model": LLAMA,
    "eagle": LLAMA,
    "eagle3": LLAMA,
    "slides": {**SHAPE, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 32},
}
if "medusa" in get_args(SpeculativeMethod):  # until vLLM 0.33
    DRAFTS["medusa"] = {"model_type": "medusa", "hidden_size": 64, "max_position_embeddings": 64}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is warned of."""
    lines: list[str] = []
    monkeypatch.setattr(engine_args.logger, "warning", lambda text, *args: lines.append(text % args))
    return lines


@pytest.mark.parametrize("kind", DRAFTS)
def test_drafts_go_as_far_as_the_model(kind: str, tmp_path: Path, said: list[str]) -> None:
    def start(**settings: Any) -> Any:
        speculative = draft_model(tmp_path, DRAFTS[kind], "draft_model" if kind == "slides" else kind) | settings
        return configure(tmp_path, LLAMA, speculative_config=speculative).speculative_config

    extended = start()
    assert extended.draft_model_config.max_model_len == 512
    assert getattr(extended.attention_backend, "name", None) == (None if kind == "medusa" else "CUSTOM")
    assert not said
    assert start(max_model_len=48).draft_model_config.max_model_len == 48
    assert [line.split(". ")[0] for line in said] == ["Drafts end at 48 tokens, the speculative config's max_model_len"]


@pytest.mark.parametrize("method", ["draft_model", "eagle", "eagle3"])
def test_drafts_that_are_not_extended(method: str, tmp_path: Path, said: list[str]) -> None:
    def start(config: dict[str, Any], backend: str | None = None, **settings: Any) -> Any:
        speculative = draft_model(tmp_path, config, method) | {"attention_backend": backend}
        return configure(tmp_path, LLAMA, speculative_config=speculative, **settings).speculative_config

    other = start(LLAMA, "TRITON_ATTN")
    assert (other.attention_backend.name, other.draft_model_config.max_model_len) == ("TRITON_ATTN", 64)
    assert "draft is not extended: the speculative config asks for the attention backend TRITON_ATTN" in said[0]
    assert "Drafts end at 64 tokens, the draft's own length." in said[1]
    said.clear()
    odd = {**LLAMA, "head_dim": 24}
    left = start(odd)
    assert (left.attention_backend, left.draft_model_config.max_model_len) == (None, 64)
    assert "draft is not extended: its heads have 24" in said[0]
    assert "Drafts end at 64 tokens, the draft's own length." in said[1]
    refused = (
        r"cannot serve the draft model .*draft: its heads have 24 dimensions.* Or choose another attention_backend"
    )
    with pytest.raises(ValueError, match=refused):
        start(odd, "CUSTOM")
    # What is chosen for a kind of layers is a draft's too.
    by_kind = {"attention_backend": None, "attention_config": {"backend_per_kind": {"full_attention": "CUSTOM"}}}
    with pytest.raises(ValueError, match=refused):
        start(odd, **by_kind)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^Invalid repository ID or local directory specified: .*") as found:
        plan_report(str(tmp_path), 512, {})
    assert "\n" not in str(found.value)
    assert "pydantic" not in str(found.value)


def test_a_draft_model_does_not_turn_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM 0.33 does with its V2 runner, which lowers the served length to the draft's while it is configured."""

    def limit(self: VllmConfig) -> None:
        if self.speculative_config is not None:
            draft = self.speculative_config.draft_model_config
            self.model_config.max_model_len = min(self.model_config.max_model_len, draft.max_model_len)

    def configured(self: VllmConfig) -> None:
        original(self)
        self._limit_max_model_len_to_draft()

    original = VllmConfig.__post_init__
    monkeypatch.setattr(VllmConfig, "__post_init__", configured)
    monkeypatch.setattr(VllmConfig, "_limit_max_model_len_to_draft", limit, raising=False)
    plugin.register()

    def start(draft: dict[str, Any], **settings: Any) -> Any:
        return configure(tmp_path, LLAMA, speculative_config=draft_model(tmp_path, draft), **settings)

    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    for draft in (LLAMA, {**LLAMA, "rope_parameters": yarn}):
        vllm_config = start(draft)
        assert read_plan(vllm_config).groups
        assert vllm_config.model_config.max_model_len == 512
        assert vllm_config.speculative_config.draft_model_config.max_model_len == 512
    with pytest.raises(ValueError, match=r"draft end at 64 tokens, and vLLM's V2 model runner cannot serve 512"):
        start({**LLAMA, "head_dim": 24})
    # Where nothing is grouped, vLLM's limit stands.
    short = {**LLAMA, "max_position_embeddings": 32}
    assert start(short, max_model_len=64).model_config.max_model_len == 32


def test_images_whose_tokens_look_ahead(tmp_path: Path) -> None:
    # Gemma 3's own config would need its image processor, and so torchvision; vLLM goes by this key first.
    config = {**LLAMA, "is_mm_prefix_lm": True}
    for length in (64, 512):  # within the trained length too
        with pytest.raises(ValueError, match=r"images attend to each other in both directions.*--limit-mm-per-prompt"):
            configure(tmp_path, config, max_model_len=length)


def test_gpus_that_are_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = SimpleNamespace(is_cuda=lambda: True, get_device_capability=lambda: DeviceCapability(7, 5))
    monkeypatch.setattr(support, "current_platform", old)
    triton = {"self_extend": {"kernel": "triton"}}
    with pytest.raises(
        ValueError,
        match=r"triton kernels.*need a compute capability of 8\.0 \(Ampere\) or more, .* GPU's is 7\.5",
    ):
        configure(tmp_path, LLAMA, additional_config=triton)
    old.get_device_capability = lambda: DeviceCapability(8, 0)
    assert configure(tmp_path, LLAMA, additional_config=triton)


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="self_extend has no setting 'group'; the settings are group_size, "):
        configure(tmp_path, LLAMA, additional_config={"self_extend": {"group": 8}})
    numbers = {"group_size": 4, "neighbor_window": 16}
    with pytest.raises(ValueError, match=r"max_model_len is 512.*reaches 208 tokens. Set group_size to 11 or more"):
        configure(tmp_path, LLAMA, additional_config={"self_extend": numbers})
    with pytest.raises(
        ValueError, match=r"an automatic group_size uses 42 positions.*Set neighbor_window to at most 30"
    ):
        configure(tmp_path, LLAMA, additional_config={"self_extend": {"neighbor_window": 31}})
    plan = read_plan(
        configure(tmp_path, LLAMA, max_model_len=64, additional_config={"self_extend": {"neighbor_window": 63}})
    )
    assert not plan.groups, "where nothing past the trained length is served, any window will do"


def test_slow_kernels_are_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(engine_args.logger, "warning", lambda text, *args: said.append(text % args))

    def missing() -> None:
        raise ImportError("no compiler")

    monkeypatch.setitem(backends.KERNEL_SETS, "cpu", backends.KernelSet(missing, "cpu"))
    assert read_plan(configure(tmp_path, LLAMA)).kernel == "reference"
    assert any("cpu kernels cannot be loaded (no compiler), so the slower reference" in line for line in said)


def test_workers_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rotations from vLLM's workers .*, and the worker class is my\.Worker"):
        configure(tmp_path, LLAMA, worker_cls="my.Worker")


def test_an_unsupported_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineArgs, "create_engine_config", EngineArgs.create_engine_config.__wrapped__)
    monkeypatch.setattr(plugin, "_vllm_version", lambda: "0.40.0")
    plugin.register()
    with pytest.raises(RuntimeError, match=r"supports vLLM .*, but vLLM 0\.40\.0 is installed"):
        configure(tmp_path, LLAMA, max_model_len=64)
    assert configure(tmp_path, LLAMA, max_model_len=64, attention_backend=None), "without the flag vLLM goes on"


@pytest.mark.parametrize("key", ["self_extend", "self-extend"])
def test_settings_without_the_backend_are_warned_about(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(engine_args.logger, "warning", lambda text, *args: said.append(text % args))
    configure(tmp_path, LLAMA, attention_backend=None, max_model_len=64, additional_config={key: {}})
    assert any(f"[{key!r}] is set, but without --attention-backend CUSTOM it has no effect" in line for line in said)


def test_settings_in_another_place_are_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(engine_args.logger, "warning", lambda text, *args: said.append(text % args))
    configure(tmp_path, LLAMA, additional_config={"self_extend": {}, "other": {"kernel": "theirs"}})
    assert any("additional_config has 'kernel' outside of 'self_extend'" in line for line in said)


def test_a_wrong_rotation_cannot_serve(checkpoint: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **factors: bool) -> torch.Tensor:
        return 1.01 * inverse_frequencies(*args, **factors)

    monkeypatch.setattr(rotary_modules, "inverse_frequencies", wrong)
    with pytest.raises(ValueError, match=r"rotary_emb: this RotaryEmbedding does not rotate as the RoPE parameters"):
        LLM(checkpoint("llama"), attention_backend="CUSTOM", max_model_len=512, **IN_PROCESS)


@pytest.mark.parametrize("changed", ["query", "key"])
def test_vectors_changed_after_their_rotation_cannot_serve(
    changed: str, checkpoint: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the norms with weights in HunYuan, which come after the rotation."""

    def forward(self: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        vectors = {"query": query, "key": key}
        size = vectors[changed].shape[-1]
        vectors[changed] = vectors[changed] * torch.linspace(0.5, 1.5, size)
        return original(self, **vectors, value=value)

    original = Attention.forward
    monkeypatch.setattr(Attention, "forward", forward)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.attn: its queries and keys are not what the"):
        LLM(checkpoint("llama"), attention_backend="CUSTOM", max_model_len=512, **IN_PROCESS)


def test_a_layer_that_the_model_does_not_use_cannot_serve(
    checkpoint: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attention, "forward", lambda self, query, key, value: torch.zeros_like(query))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.attn: the model does not use this layer"):
        LLM(checkpoint("llama"), attention_backend="CUSTOM", max_model_len=512, **IN_PROCESS)


def test_layers_of_another_kind_cannot_serve(checkpoint: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HRM's, whose prompts attend in both directions."""
    monkeypatch.setattr(llama, "Attention", PrefillPrefixLMAttention)
    with pytest.raises(ValueError, match=r"layers\.0.* is a PrefillPrefixLMAttention\. Self-Extend knows") as refused:
        LLM(checkpoint("llama"), attention_backend="CUSTOM", max_model_len=512, **IN_PROCESS)
    assert plan_report(checkpoint("llama"), 512, {}).why_not in str(refused.value), "plan says the same"


def test_layers_with_another_backend_cannot_serve(checkpoint: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """As MiMo V2's, whose code chooses it since its keys and values have different sizes."""
    monkeypatch.setattr(llama, "Attention", partial(Attention, attn_backend=CPUAttentionBackend))
    with pytest.raises(ValueError, match=r"layers\.0.* has another attention backend, CPU_ATTN") as refused:
        LLM(checkpoint("llama"), attention_backend="CUSTOM", max_model_len=512, **IN_PROCESS)
    assert plan_report(checkpoint("llama"), 512, {}).why_not in str(refused.value), "plan says the same"


def test_values_of_another_size_cannot_serve(checkpoint: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(self: Attention, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.head_size_v = 16

    original = Attention.__init__
    monkeypatch.setattr(Attention, "__init__", build)
    with pytest.raises(ValueError, match=r"model\.layers\.0.*has keys of 32 and values of 16 dimensions") as refused:
        LLM(checkpoint("llama"), attention_backend="CUSTOM", max_model_len=512, **IN_PROCESS)
    assert plan_report(checkpoint("llama"), 512, {}).why_not in str(refused.value), "plan says the same"


IN_PROCESS = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32", "kv_cache_memory_bytes": 64 << 20}


def test_an_fp8_e5m2_cache_is_refused(checkpoint: Callable) -> None:
    with pytest.raises(
        ValueError, match=r"Self-Extend \(attention backend CUSTOM\) cannot run.*kv_cache_dtype not supported"
    ):
        LLM(checkpoint("llama"), attention_backend="CUSTOM", max_model_len=512, kv_cache_dtype="fp8_e5m2", **IN_PROCESS)


@pytest.mark.parametrize("max_model_len", [None, -1, 64])
def test_a_length_that_was_left_out_is_warned_of(
    max_model_len: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the backend chosen, nothing extended is not what was meant; a length that was given is."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    configure(tmp_path, {**LLAMA, "max_position_embeddings": 64}, max_model_len=max_model_len)
    told = {record.getMessage() for record in caplog.records if record.name == "vllm.self_extend"}
    warning = (
        "Self-Extend has nothing to extend: without --max-model-len the model is served at its own length, 64 tokens. "
        "Pass the length to serve, for instance --max-model-len 256."
    )
    assert (warning in told) == (max_model_len != 64)
