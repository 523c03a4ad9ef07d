"""What Self-Extend cannot serve, and why: known from the configuration, before a worker starts."""

from typing import Any

from vllm.config import ModelConfig, VllmConfig

from .config import ExtensionPlan
from .rotary import SUPPORTED_ROPE_TYPES, rope_parameters, unsupported_rope_type

NOPE_CONFIG_KEYS = ("no_rope_layers", "no_rope_layer_interval", "use_rope_layers", "layer_rope_theta")
NOPE_MODEL_TYPES = ("cohere2", "cohere2_moe", "exaone4", "exaone_moe", "llama4_text", "olmo_hybrid")
"""Architectures with layers that have no RoPE among layers that have it (vLLM 0.32, `model_executor/models`)."""

PARALLEL_DRAFT_METHODS = ("dflash", "dspark")
"""`precompute_and_store_context_kv` in vLLM 0.32's `model_executor/models/qwen3_dflash.py` and those built on it."""


def unsupported_reason(vllm_config: VllmConfig, plan: ExtensionPlan) -> str | None:
    """Why this model, or this way to run it, cannot work with the plan; None if nothing speaks against it."""
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return (
            "context parallelism splits the positions of a sequence over devices, and Self-Extend needs them together. "
            "Set decode and prefill context parallel size to 1."
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method in PARALLEL_DRAFT_METHODS:
        return (
            f"the drafts of speculative method {speculative.method!r} write the cache themselves, and rotate keys by a "
            "table of their own. Use another method, ngram or eagle for instance."
        )
    return unsupported_model_reason(vllm_config.model_config, plan)


def unsupported_model_reason(model_config: ModelConfig, plan: ExtensionPlan) -> str | None:
    """Like `unsupported_reason`, from the model's configuration alone."""
    config = model_config.hf_text_config
    if model_config.is_encoder_decoder:
        return "it is an encoder-decoder model; Self-Extend is for decoder-only models."
    if model_config.is_attention_free:
        return "it has no attention layers."
    if model_config.use_mla:
        return "it uses multi-head latent attention (MLA), whose cache holds compressed keys that cannot be re-rotated."
    if model_config.uses_mrope or getattr(model_config, "uses_xdrope_dim", 0):
        return "its RoPE has several position axes (M-RoPE), and Self-Extend groups one."
    if getattr(config, "dual_chunk_attention_config", None):
        return "it uses dual chunk attention, which re-maps positions by itself."
    if _uses_alibi(config):
        return "it uses ALiBi; Self-Extend needs rotary position embeddings (RoPE)."
    parameters = list(rope_parameters(config))
    if not parameters:
        return "its config names no rotary position embeddings (RoPE), which Self-Extend re-maps."
    for one in parameters:
        if (rope_type := one.get("rope_type", "default")) not in SUPPORTED_ROPE_TYPES:
            return unsupported_rope_type(rope_type)
    for key in NOPE_CONFIG_KEYS:
        if getattr(config, key, None):
            return f"some of its layers have no RoPE ({key} in its config), and which ones is not known to Self-Extend."
    if config.model_type in NOPE_MODEL_TYPES:
        return f"some layers of a {config.model_type} model have no RoPE, and which ones is not known to Self-Extend."
    return _sliding_reason(model_config, plan)


def _uses_alibi(config: Any) -> bool:
    attn_config = getattr(config, "attn_config", None) or {}
    in_attn_config = attn_config.get("alibi") if isinstance(attn_config, dict) else getattr(attn_config, "alibi", False)
    return bool(
        getattr(config, "alibi", False)
        or in_attn_config
        or getattr(config, "position_embedding_type", None) == "alibi"
        or config.model_type == "bloom"
    )


def _sliding_reason(model_config: ModelConfig, plan: ExtensionPlan) -> str | None:
    """A model whose every layer slides has no long attention to extend."""
    window = model_config.get_sliding_window()
    layer_types = getattr(model_config.hf_text_config, "layer_types", None) or []
    if window is None or window >= plan.max_model_len or any(kind == "full_attention" for kind in layer_types):
        return None
    return (
        f"every layer attends to a sliding window of {window} tokens, so there is no long attention to extend. Add "
        "--disable-sliding-window (vLLM then takes the window for the trained length)."
    )
