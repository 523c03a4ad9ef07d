"""What Self-Extend adds to vLLM's workers, whatever they run on: two steps around the loaded model."""

from typing import Any

from .binding import bind_models, change_numbers


class SelfExtendWorker:
    """To be inherited from before one of vLLM's workers; see `support.SELF_EXTEND_WORKERS`."""

    model_runner: Any
    vllm_config: Any

    def load_model(self, **kwargs: Any) -> None:
        """Load the model, and give its layers their rotations."""
        super().load_model(**kwargs)  # type: ignore[misc]
        bind_models(self.model_runner, self.vllm_config)

    def change_numbers(self, group_size: int, neighbor_window: int) -> None:
        """Go on with other numbers; called through vLLM's `collective_rpc`. See `binding.change_numbers`."""
        change_numbers(self.model_runner, self.vllm_config, group_size, neighbor_window)
