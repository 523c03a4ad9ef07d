"""Self-Extend as a vLLM attention backend: glue between vLLM's batches and the kernels, no arithmetic.

Modelled on the interface in `vllm/v1/attention/backend.py` (0.32 and 0.33).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
    max_decode_query_len,
)
from vllm.v1.kv_cache_interface import KVCacheLayout
from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

from ..backends import load_kernels
from ..backends.interface import AttentionBatch, AttentionParams, GroupSizes, Host, Kernels, LayerKernels, Rotation
from ..backends.limits import MAX_POSITIONS
from ..method.plan import ExtensionPlan, read_plan
from .gpu_operators import HALF_DTYPES, find_attention, find_store

logger = init_logger("vllm.self_extend")


class SelfExtendBackend(AttentionBackend):
    """What `--attention-backend CUSTOM` selects."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        # Attention.__init__ looks the name up in AttentionBackendEnum.
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["SelfExtendImpl"]:
        return SelfExtendImpl

    @staticmethod
    def get_builder_cls() -> type["SelfExtendMetadataBuilder"]:
        return SelfExtendMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: Any) -> bool:
        """As listed; but where fp8 is e4m3fnuz (MI300), vLLM stores bytes that the kernels would read wrongly."""
        is_fp8 = str(kv_cache_dtype).startswith("fp8")
        supported: bool = super().supports_kv_cache_dtype(kv_cache_dtype)
        return supported and not (is_fp8 and current_platform.is_fp8_fnuz())

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


@dataclass
class SelfExtendMetadata(AttentionMetadata):
    """One step's requests.

    Attributes:
        batch: Their tensors.
        num_actual_tokens: Tokens of the step; in a CUDA graph the padding that belongs to no request is among them.

    """

    batch: AttentionBatch
    num_actual_tokens: int


class SelfExtendMetadataBuilder(AttentionMetadataBuilder[SelfExtendMetadata]):
    """Turns vLLM's common metadata into the kernels' batch, once per step for all layers.

    Of decodes the batch refers to vLLM's persistent buffers and holds nothing of its own, so a captured CUDA graph
    finds the next step's requests in it, and vLLM may draft several tokens with one batch. Prefills are taken apart
    on the host.
    """

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = [vllm_config.compilation_config.static_forward_context[name] for name in layer_names]
        # The longest of a draft model's requests to be verified has one token more.
        self.decode_len = max([max_decode_query_len(vllm_config) + 1, *(layer.impl.decode_len for layer in layers)])
        # A draft model reads a token more of each request than vLLM says on the host
        # (`vllm/v1/worker/gpu/spec_decode/standalone_ar/speculator.py`). Beside its target's layers, in a builder for
        # both, it is not what a batch is made for.
        self.knows_lengths = not all(layer.impl.is_of_draft for layer in layers)
        # For kernels of whose calls no graph is captured vLLM builds each draft's batch.
        self.supports_draft_decode_metadata_update = _captures_graphs(vllm_config)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """A captured graph of decodes can be replayed with any others, or cannot be captured."""
        return AttentionCGSupport.UNIFORM_BATCH if _captures_graphs(vllm_config) else AttentionCGSupport.NEVER

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> int | None:
        """Decodes of a captured graph may have any lengths up to that: kernels read them from the device."""
        return max_decode_query_len(vllm_config) if _captures_graphs(vllm_config) else None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SelfExtendMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("Self-Extend's attention is causal; this model asks for non-causal attention.")
        num_tokens = common.num_actual_tokens
        batch = AttentionBatch(
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping[:num_tokens],
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            decode_len=self.decode_len,
            query_start_loc_cpu=common.query_start_loc_cpu,
            seq_lens_cpu=common.seq_lens_cpu_upper_bound if self.knows_lengths else None,
        )
        return SelfExtendMetadata(batch, num_tokens)

    def update_draft_decode_metadata(self, metadata: SelfExtendMetadata) -> None:
        """Nothing to do: what the metadata refers to has been updated."""


def _captures_graphs(vllm_config: VllmConfig) -> bool:
    """Whether the kernels do not look at a batch of decodes from the host."""
    return load_kernels(read_plan(vllm_config).kernel).IS_CAPTURABLE


class SelfExtendImpl(AttentionImpl[SelfExtendMetadata]):
    """One layer. A layer with a sliding window keeps ordinary positions: they never leave the trained range."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if alibi_slopes is not None:
            raise NotImplementedError("Self-Extend needs rotary position embeddings; this model uses ALiBi.")
        if attn_type != AttentionType.DECODER:
            raise NotImplementedError(f"Self-Extend serves decoder attention only; this layer's type is {attn_type}.")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.soft_cap = logits_soft_cap or 0.0
        self.sinks = sinks
        self.shares_kv_cache = kv_sharing_target_layer_name is not None
        vllm_config = get_current_vllm_config()
        self.plan = read_plan(vllm_config)
        self.kernels: Kernels = load_kernels(self.plan.kernel)
        self.decode_len = self.kernels.decode_len(self.num_heads // self.num_kv_heads)
        self.host = Host(vllm_config.scheduler_config.max_num_batched_tokens, self.plan.max_model_len)
        self.flash_attention = find_attention(head_size, self.scale, self.soft_cap)
        self.is_of_draft = vllm_config.model_config.runner_type == "draft"
        self.workspace_size: int | None = None
        self.rotation: Rotation | None = None
        self.group_sizes: GroupSizes | None = None
        self.is_bound = False
        self.layer_kernels: LayerKernels | None = None

    def may_group(self, plan: ExtensionPlan) -> bool:
        """Whether this layer groups positions by `plan` if it has a rotation."""
        return plan.groups and self.sliding_window is None

    def bind(self, plan: ExtensionPlan, grouping: tuple[GroupSizes, Rotation] | None = None) -> None:
        """Give a layer its numbers, and what it groups positions by if it does, once the model is loaded."""
        self.plan = plan
        self.group_sizes, self.rotation = grouping or (None, None)
        self.is_bound = True
        self.layer_kernels = None

    def warm_up(self, layer: AttentionLayer, dtype: torch.dtype) -> None:
        """Compile what serving the layer needs; its cache is allocated, and its queries will have that dtype."""
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
        qkv = torch.zeros(2, sum(heads), self.head_size, dtype=dtype, device=layer.kv_cache.device)
        query, key, value = qkv.split(heads, dim=1)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        self._workspace(query)  # a draft's may not have been asked for while vLLM measured memory
        self._layer_kernels(layer, dtype).warm_up(query, key, value, layer.kv_cache, out)

    def _layer_kernels(self, layer: AttentionLayer, dtype: torch.dtype) -> LayerKernels:
        if self.layer_kernels is None:  # made once the layer is bound and its weights are loaded
            host = self.host
            if self.kernels.IS_CAPTURABLE:  # the others run on CPUs, or anywhere
                attention = self.flash_attention if dtype in HALF_DTYPES else None
                if attention is not None:
                    logger.info_once("Self-Extend's prefills run on FlashAttention %d.", attention.version)
                host = dataclasses.replace(host, store=find_store(layer, self.kv_cache_dtype), attention=attention)
            self.layer_kernels = self.kernels.prepare(self.params(layer), host)
        return self.layer_kernels

    def _workspace(self, query: torch.Tensor) -> torch.Tensor | None:
        """Room for what kernels work out, which vLLM's profiling sees: the same for all layers, one a microbatch."""
        if self.workspace_size is None:
            shape = self.num_heads, self.num_kv_heads, self.head_size, query.dtype
            self.workspace_size = self.kernels.workspace_size(*shape, query.device, self.host)
        if self.workspace_size == 0 or not is_workspace_manager_initialized():
            return None
        (workspace,) = current_workspace_manager().get_simultaneous(((self.workspace_size,), torch.uint8))
        found: torch.Tensor = workspace
        return found

    def params(self, layer: AttentionLayer) -> AttentionParams:
        """What kernels need to know of the layer.

        Raises:
            RuntimeError: The layer was not bound.

        """
        if self.may_group(self.plan) and not self.is_bound:
            raise RuntimeError(f"{layer} was not bound to its rotation after the model was loaded.")
        is_quantized = self.kv_cache_dtype.startswith("fp8")
        return AttentionParams(
            scale=self.scale,
            group_sizes=self.group_sizes,
            neighbor_window=self.plan.neighbor_window,
            log_scale_len=0 if self.group_sizes is None else self.plan.log_scale_len,
            soft_cap=self.soft_cap,
            sliding_window=min(self.sliding_window or 0, MAX_POSITIONS),  # past all positions it is none
            rotation=self.rotation,
            sinks=self.sinks,
            k_scale=layer._k_scale if is_quantized else None,
            v_scale=layer._v_scale if is_quantized else None,
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: SelfExtendMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend.

        Args:
            layer: The attention layer.
            query: `[num_tokens, num_heads, head_size]`, padding included, rotated at true positions.
            key: `[num_tokens, num_kv_heads, head_size]`; None where the layer reads another one's cache.
            value: Like `key`.
            kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`.
            attn_metadata: None while vLLM measures memory.
            output: `[num_tokens, num_heads, head_size]`, written.
            output_scale: Must be None.
            output_block_scale: Must be None.

        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("Self-Extend does not write quantized attention output.")
        workspace = self._workspace(query)
        if attn_metadata is None:
            return output.zero_()
        kernels = self._layer_kernels(layer, query.dtype)
        num_tokens, batch = attn_metadata.num_actual_tokens, attn_metadata.batch
        if not self.shares_kv_cache and key is not None and value is not None:
            kernels.store(key[:num_tokens], value[:num_tokens], kv_cache, batch)
        kernels.attend(query[:num_tokens], kv_cache, batch, output[:num_tokens], workspace)
        return output
