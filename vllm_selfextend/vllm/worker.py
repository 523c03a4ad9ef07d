"""What Self-Extend adds to vLLM's workers, whatever they run on: what a loaded model needs before it serves."""

from collections.abc import Iterator
from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention

from ..method.plan import read_plan
from ..method.positions import GroupSize
from .attention import SelfExtendImpl
from .binding import bind_models, change_numbers


class SelfExtendWorker:
    """To be inherited from before one of vLLM's workers; see `support.SELF_EXTEND_WORKERS`."""

    model_runner: Any
    vllm_config: Any

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, and give its layers their rotations."""
        super().load_model(**kwargs)  # type: ignore[misc]
        check_layers(self.vllm_config)
        if read_plan(self.vllm_config).changes_model:
            bind_models(self.model_runner, self.vllm_config)

    def determine_available_memory(self) -> int:
        """Measure memory, and let go of the small cache that graphs are captured with on the way."""
        available: int = super().determine_available_memory()  # type: ignore[misc]
        for layer in _layers(self.vllm_config):
            layer.impl.layer_kernels = None
        return available

    def compile_or_warm_up_model(self) -> Any:
        """Compile the layers' kernels, the draft model's too, so that no request waits for that."""
        for layer in _layers(self.vllm_config):
            layer.impl.warm_up(layer, self.vllm_config.model_config.dtype)
        return super().compile_or_warm_up_model()  # type: ignore[misc]

    def change_numbers(self, group_size: GroupSize, neighbor_window: int) -> None:
        """Go on with other numbers; called through vLLM's `collective_rpc`. See `binding.change_numbers`."""
        change_numbers(self.model_runner, self.vllm_config, group_size, neighbor_window)


def check_layers(vllm_config: VllmConfig) -> None:
    """Refuse layers that cannot be served, whether they group positions or not. Needs no weights.

    Raises:
        ValueError: There is one.

    """
    for layer in _layers(vllm_config):
        if reason := _unsupported_reason(layer):
            model = vllm_config.model_config.model
            raise ValueError(f"Self-Extend cannot serve {model}: {layer.layer_name} {reason}")


def _layers(vllm_config: VllmConfig) -> Iterator[Attention]:
    """The model's and its draft's attention layers, with a sliding window or not."""
    for layer in vllm_config.compilation_config.static_forward_context.values():
        if isinstance(layer, Attention) and isinstance(layer.impl, SelfExtendImpl):
            yield layer


def _unsupported_reason(layer: Attention) -> str | None:
    """Why a layer cannot be served; None if it can."""
    if type(layer) not in (Attention, ChunkedLocalAttention):
        return (
            f"is a {type(layer).__name__}. Self-Extend knows vLLM's Attention and ChunkedLocalAttention; others keep "
            "other keys, or let tokens see others than those before them."
        )
    if layer.head_size_v != layer.head_size:
        return f"has keys of {layer.head_size} and values of {layer.head_size_v} dimensions; they must have the same."
    return None
