"""What reaches each attention layer when the loaded model runs on a probe, for `rotation_probe.py` to make sense of.

Every token of the probe enters every decoder layer as the same vector, and no attention layer answers. So what reaches
a layer's attention depends on a token's position through the layer's rotation alone, whatever the model's code does on
the way: it may skip the rotation in some layers, or change queries and keys once they are rotated.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention

QueryAndKey: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]


def queries_and_keys(
    model: nn.Module, layers: Mapping[str, Attention], hidden_size: int, run: Callable[[], Any]
) -> dict[str, QueryAndKey]:
    """What reaches each attention layer while `run()` runs the model once.

    Args:
        model: The model.
        layers: Its attention layers by their paths.
        hidden_size: The size of the vector that goes from one decoder layer to the next.
        run: Runs the model without attention metadata, so that every attention layer's output is zero.

    Returns:
        For each layer that was reached the queries `[num_tokens, num_heads, head_size]` and the keys
        `[num_tokens, num_kv_heads, head_size]`, on the CPU, in the model's dtype; no keys where the layer reads those
        of another one.

    """
    found: dict[str, QueryAndKey] = {}
    with contextlib.ExitStack() as changes:
        for path, layer in layers.items():
            changes.enter_context(_recorded(layer, path, found))
        for decoder_layer in {layer for path in layers for layer in _decoder_layers(model, path)}:
            hook = decoder_layer.register_forward_pre_hook(_same_vector_everywhere(hidden_size), with_kwargs=True)
            changes.callback(hook.remove)
        with torch.inference_mode():
            run()
    return found


@contextlib.contextmanager
def _recorded(layer: Attention, path: str, found: dict[str, QueryAndKey]) -> Iterator[None]:
    """While open, the layer notes what it is called with, and answers nothing."""

    def forward(
        layer: Any, query: torch.Tensor, key: torch.Tensor | None, value: Any, *_: Any, output: torch.Tensor, **__: Any
    ) -> None:
        output.zero_()
        shares_keys = layer.kv_sharing_target_layer_name is not None
        found[path] = query.cpu(), None if shares_keys or key is None else key.cpu()

    layer.impl.forward = forward
    try:
        yield
    finally:
        del layer.impl.forward


def _decoder_layers(model: nn.Module, path: str) -> Iterable[nn.Module]:
    """All elements of the first list of modules on the way to a module, since decoder layers may share it (Zamba 2).

    MTP heads have a dict of modules, each of which lets no token enter at position 0 and then calls a decoder layer. So
    there it is all on the way down to what calls the attention layer, which may get queries already.
    """
    on_the_way = [model]
    for name in path.split("."):
        on_the_way.append(on_the_way[-1].get_submodule(name))
    for depth, module in enumerate(on_the_way):
        if isinstance(module, nn.ModuleList):
            return module
        if isinstance(module, nn.ModuleDict):
            return on_the_way[depth + 1 : -2]
    return ()


def _same_vector_everywhere(hidden_size: int) -> Callable[..., Any]:
    """Put one random vector in the place of each token's, in every argument that has tokens' vectors."""
    vector = torch.randn(hidden_size, generator=torch.Generator().manual_seed(0))

    def replaced(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.shape[-1] != hidden_size:
            return value
        return vector.to(value).expand_as(value).contiguous()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tuple(map(replaced, args)), {name: replaced(value) for name, value in kwargs.items()}

    return hook
