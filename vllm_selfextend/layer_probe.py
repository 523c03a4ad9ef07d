"""Which rotation the queries and keys of each attention layer get, found by running the loaded model on a probe.

Every token of the probe enters every decoder layer as the same vector, and no attention layer answers. So what reaches
a layer's attention depends on a token's position through the layer's rotation alone, whatever the model's code does on
the way: it may skip the rotation in some layers, or change queries and keys once they are rotated.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention

from .rotary import Frequencies
from .rotation_probe import ModelRotation, matching_rotation

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


class UntoldError(ValueError):
    """What reached a layer's attention says nothing of its rotation: it is not finite, or too small to turn visibly."""


def rotation_of(
    query: torch.Tensor, key: torch.Tensor | None, positions: torch.Tensor, candidates: Sequence[Frequencies]
) -> ModelRotation | None:
    """The rotation that explains what reached a layer's attention; None if the layer has none.

    Queries may be longer or shorter by their position as well, as of models that sharpen attention in long texts. Keys
    may not.

    Args:
        query: `[num_tokens, num_heads, head_size]`.
        key: `[num_tokens, num_kv_heads, head_size]`, or None.
        positions: `[num_tokens]`, int64, on the CPU, ascending from 0.
        candidates: The frequencies that the model is known to rotate by.

    Raises:
        UntoldError: Nothing speaks for one of the candidates, and nothing against it.
        ValueError: None of the candidates explains it.

    """
    seen = [_at_equal_length(query)] if key is None else [key, _at_equal_length(query)]
    # A head with an infinity says nothing, whatever the others' are.
    seen = [x[:, x.isfinite().all(2).all(0)] for x in seen]

    def matching(x: torch.Tensor, frequencies: Iterable[Frequencies]) -> ModelRotation | None:
        return matching_rotation(x[:1].transpose(0, 1), x.transpose(0, 1), positions, frequencies)

    still = [matching(x, [NO_ROTATION]) is not None for x in seen]
    # Vectors that do not move, and would not if they were rotated.
    told = [not (is_still and matching(x, candidates)) for x, is_still in zip(seen, still, strict=True)]
    if not any(told):
        raise UntoldError(
            "its queries and keys are not finite, or nothing but the rounding of numbers near zero, so how it is "
            "rotated cannot be told. Load the model in bfloat16 or float32."
        )
    if all(itertools.compress(still, told)):
        return None
    for frequencies in candidates:
        found = [matching(x, [frequencies]) for x in itertools.compress(seen, told)]
        if None not in found and len({rotation.interleaved for rotation in found if rotation}) == 1:
            return found[0]
    raise ValueError(
        "its queries and keys are not what the model's RoPE makes of them. Something changes them once they are "
        "rotated (a norm with weights, for instance), and a key rotated back would give wrong answers."
    )


NO_ROTATION: Frequencies = torch.zeros(1)


def _at_equal_length(x: torch.Tensor) -> torch.Tensor:
    """Each head's vectors as long as the one at position 0."""
    lengths = x.float().norm(dim=-1, keepdim=True)
    scaled: torch.Tensor = x.float() * (lengths[:1] / lengths.clamp(min=torch.finfo(torch.float32).tiny))
    return scaled.to(x.dtype)


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
    """All elements of the first list of modules on the way to a module, since decoder layers may share it (Zamba 2)."""
    module = model
    for name in path.split("."):
        module = module.get_submodule(name)
        if isinstance(module, nn.ModuleList):
            return module
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
