"""Which rotation turned these vectors? Told by trying candidates on them; what no candidate explains is not known."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..backends.interface import Rotation
from .rope import Frequencies, cos_sin


@dataclass(frozen=True)
class ModelRotation:
    """How a model rotates: its frequencies, and which dimensions make a pair (see `backends.interface.Rotation`)."""

    frequencies: Frequencies
    interleaved: bool


def matching_rotation(
    before: torch.Tensor, after: torch.Tensor, positions: torch.Tensor, candidates: Iterable[Frequencies]
) -> ModelRotation | None:
    """The first of the candidates, in either pairing, that turns `before` into `after`; None if none does.

    Args:
        before: `[..., positions or 1, head_size]`, not rotated.
        after: `[..., positions, head_size]`, in the dtype that the model computes in.
        positions: `[positions]`, int64, on the CPU.
        candidates: What the model may rotate by; those of more dimensions than a head has are passed over.

    """
    before, dtype = before.to("cpu", torch.float64), torch.finfo(after.dtype)
    after = after.to("cpu", torch.float64)
    # The angles' error, and the rounding of the product, in proportion to what was turned; that of float16's smallest
    # numbers is not.
    allowed = 8 * (angle_error(positions) + dtype.eps) * before.abs().amax(-1, keepdim=True)
    allowed = allowed + 8 * dtype.smallest_normal * dtype.eps
    for frequencies in candidates:
        if 2 * len(frequencies) > before.shape[-1]:
            continue
        for interleaved in (False, True):
            rotation = Rotation(rotation_rows(frequencies, positions), interleaved)
            wanted = rotation.turn(before.expand_as(after), torch.arange(len(positions)))
            if bool(((after - wanted).abs() <= allowed).all()):
                return ModelRotation(frequencies, interleaved)
    return None


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
        "rotated (a norm with weights, for instance), and keys turned all the same would give wrong answers."
    )


NO_ROTATION: Frequencies = torch.zeros(1)


def _at_equal_length(x: torch.Tensor) -> torch.Tensor:
    """Each head's vectors as long as the one at position 0."""
    lengths = x.float().norm(dim=-1, keepdim=True)
    scaled: torch.Tensor = x.float() * (lengths[:1] / lengths.clamp(min=torch.finfo(torch.float32).tiny))
    return scaled.to(x.dtype)


def probe_positions(length: int) -> torch.Tensor:
    """Dense where one wrong frequency shows, then sparse to the end: `[positions]`, int64, ascending from 0."""
    positions = {*range(33), *(2**n for n in range(6, 40)), length - 1}
    return torch.tensor(sorted(position for position in positions if position < length))


def rotation_rows(frequencies: Frequencies, positions: torch.Tensor) -> torch.Tensor:
    """Cosines, then sines, of each position: `[positions, 2 * frequencies]`, float64."""
    return torch.cat([cos_sin(frequencies, p, p + 1, torch.float64) for p in positions.tolist()])


def angle_error(positions: torch.Tensor) -> torch.Tensor:
    """What computing the angles in float32, as vLLM and transformers do, may cost: `[positions, 1]`."""
    return positions[:, None] * 2.0**-21
