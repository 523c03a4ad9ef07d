"""Which rotation turned these vectors? Told by trying candidates on them; what no candidate explains is not known."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from .backends.interface import Rotation
from .backends.reference import rotate
from .rotary import Frequencies, cos_sin


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
            wanted = rotate(before.expand_as(after), torch.arange(len(positions)), rotation)
            if bool(((after - wanted).abs() <= allowed).all()):
                return ModelRotation(frequencies, interleaved)
    return None


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
