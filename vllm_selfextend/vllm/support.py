"""What Self-Extend cannot serve, and why: what a model's configuration says, and the way it is to be run.

Of numbers `method.config` refuses, of drafts `engine_args`, of layers `worker.check_layers` and `binding.check_model`,
which need no weights; of connectors `kv_connectors` warns. `vllm-selfextend plan` asks all of them where vLLM has a
device, since it starts an engine as far as that goes without weights, and this module alone where it has none.
"""

import torch
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.platforms import current_platform

from ..backends import choose_kernels
from ..method.plan import CONFIG_KEY, ExtensionPlan
from ..method.rope import SUPPORTED_ROPE_TYPES, rope_parameters, unsupported_rope_type, uses_alibi

PARALLEL_DRAFT_METHODS = ("dflash", "dspark")
"""`precompute_and_store_context_kv` in vLLM 0.32's `model_executor/models/qwen3_dflash.py` and those built on it."""


SELF_EXTEND_WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_selfextend.vllm.cpu_worker.SelfExtendCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "vllm_selfextend.vllm.gpu_worker.SelfExtendGPUWorker",
}
"""vLLM's worker classes, and what takes their place."""


def unsupported_reason(
    plan: ExtensionPlan,
    model_config: ModelConfig,
    device: torch.device | None,
    *,
    parallel_config: ParallelConfig | None = None,
    speculative_config: SpeculativeConfig | None = None,
    must_extend: bool = True,
) -> str | None:
    """Why this model, or this way to run it, cannot be served with the plan; None if nothing speaks against it.

    Args:
        plan: The numbers, `kernel` as the user gave it.
        model_config: The model.
        device: What it will run on, if known; without it nothing is said of kernels.
        parallel_config: How it is spread over devices, if known.
        speculative_config: How drafts are made, if known and if there are any.
        must_extend: Whether a model is refused of which no layer sees the whole context. A draft is not.

    """
    if plan.changes_model:
        if parallel_config is not None and (reason := _parallel_reason(parallel_config)):
            return reason
        if speculative_config is not None and (reason := _speculative_reason(speculative_config)):
            return reason
        if reason := _model_reason(model_config):
            return reason
        if must_extend and plan.groups and (reason := _sliding_reason(model_config, plan)):
            return reason
    # The rest holds for grouped positions and others.
    if model_config.attn_type == "encoder_only" or not getattr(model_config.hf_text_config, "is_causal", True):
        return (
            "its tokens attend to those after them, too (an encoder, or is_causal is false in its config), and "
            "Self-Extend's attention is causal."
        )
    if model_config.is_mm_prefix_lm:
        return (
            "the tokens of its images attend to each other in both directions, and Self-Extend's attention is causal. "
            "To serve texts alone, tell vLLM: --limit-mm-per-prompt '{\"image\": 0}' (and 0 of what else it takes)."
        )
    return None if device is None else _kernels_reason(plan, model_config, device)


def _parallel_reason(parallel_config: ParallelConfig) -> str | None:
    if parallel_config.decode_context_parallel_size > 1 or parallel_config.prefill_context_parallel_size > 1:
        return (
            "context parallelism splits the positions of a sequence over devices, and Self-Extend needs them together. "
            "Set decode and prefill context parallel size to 1."
        )
    worker_cls = parallel_config.worker_cls
    if worker_cls not in SELF_EXTEND_WORKERS and worker_cls not in SELF_EXTEND_WORKERS.values():
        known = ", ".join(SELF_EXTEND_WORKERS)
        return (
            f"its layers get their rotations from vLLM's workers {known}, and the worker class is {worker_cls}. Leave "
            "--worker-cls out."
        )
    return None


def _speculative_reason(speculative_config: SpeculativeConfig) -> str | None:
    if speculative_config.method in PARALLEL_DRAFT_METHODS:
        return (
            f"the drafts of speculative method {speculative_config.method!r} write the cache themselves, and rotate "
            "keys by a table of their own. Use another method: ngram, or eagle, eagle3, mtp or draft_model, which are "
            "extended too."
        )
    return None


def _kernels_reason(plan: ExtensionPlan, model_config: ModelConfig, device: torch.device) -> str | None:
    # Of a GPU that was found without initializing CUDA: vLLM may fork its workers.
    found = current_platform.get_device_capability() if current_platform.is_cuda() else None
    try:
        name, kernels, _ = choose_kernels(plan.kernel, device, None if found is None else (found.major, found.minor))
    except (ValueError, RuntimeError) as error:
        return str(error)
    head_size = model_config.get_head_size()
    if problem := kernels.unsupported_head_size(head_size):
        return (
            f"its heads have {head_size} dimensions, which the {name} kernels do not take: {problem}. Setting "
            f"{CONFIG_KEY}.kernel to 'reference' would do, slowly."
        )
    return None


def _model_reason(model_config: ModelConfig) -> str | None:
    """Why the model cannot be extended."""
    config = model_config.hf_text_config
    if model_config.is_encoder_decoder:
        return "it is an encoder-decoder model; Self-Extend is for decoder-only models."
    if model_config.is_attention_free:
        return "it has no attention layers."
    if model_config.use_mla:
        return "it uses multi-head latent attention (MLA), whose cache holds compressed keys that cannot be turned."
    if getattr(model_config, "uses_xdrope_dim", 0):
        return "its RoPE has several position axes (XD-RoPE), and Self-Extend groups one."
    if model_config.uses_mrope and model_config.supports_multimodal_inputs:
        return (
            "its RoPE has several position axes (M-RoPE), which differ in images and videos, and it groups one. "
            "To serve texts alone, where they are equal, tell vLLM: --language-model-only."
        )
    if getattr(config, "dual_chunk_attention_config", None):
        return "it uses dual chunk attention, which re-maps positions by itself."
    if uses_alibi(config):
        return "it uses ALiBi; Self-Extend needs rotary position embeddings (RoPE)."
    try:
        parameters = list(rope_parameters(config))
    except ValueError as error:
        return str(error)
    if not parameters:
        return "its config names no rotary position embeddings (RoPE), which Self-Extend re-maps."
    for one in parameters:
        if (rope_type := one.get("rope_type", "default")) not in SUPPORTED_ROPE_TYPES:
            return unsupported_rope_type(rope_type)
    return None


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
