"""What a layer's rotation is taken for, by what reaches its attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_selfextend.backends.interface import Rotation
from vllm_selfextend.method.rope import inverse_frequencies
from vllm_selfextend.method.rotation_probe import UntoldError, probe_positions, rotation_of, rotation_rows

HEAD_SIZE = 32
POSITIONS = probe_positions(500)
KNOWN = [
    inverse_frequencies({"rope_theta": theta, "rope_type": "default"}, rotary_dim)
    for theta in (1e4, 1e6)
    for rotary_dim in (HEAD_SIZE, HEAD_SIZE // 2)
]


def vectors(num_heads: int, seed: int) -> torch.Tensor:
    """The same for each position: `[positions, num_heads, head_size]`."""
    drawn = torch.randn(1, num_heads, HEAD_SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.expand(len(POSITIONS), -1, -1)


def turned(x: torch.Tensor, frequencies: torch.Tensor, interleaved: bool) -> torch.Tensor:
    rows = torch.arange(len(POSITIONS))
    return Rotation(rotation_rows(frequencies, POSITIONS), interleaved).turn(x.transpose(0, 1), rows).transpose(0, 1)


@settings(derandomize=True)
@given(
    known=st.integers(0, len(KNOWN) - 1),
    interleaved=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    sharpened=st.booleans(),
    shares_keys=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_rotation_is_found(
    known: int, interleaved: bool, dtype: torch.dtype, sharpened: bool, shares_keys: bool, seed: int
) -> None:
    query, key = (turned(vectors(heads, seed), KNOWN[known], interleaved) for heads in (4, 2))
    if sharpened:  # queries that grow with their position
        query = query * (1 + 0.1 * POSITIONS.log1p())[:, None, None]
    found = rotation_of(query.to(dtype), None if shares_keys else key.to(dtype), POSITIONS, KNOWN)
    assert found is not None
    assert found.interleaved == interleaved
    assert torch.equal(found.frequencies, KNOWN[known])


@settings(derandomize=True)
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 2**32))
def test_no_rotation_is_found(dtype: torch.dtype, seed: int) -> None:
    scales = (1 + 0.1 * POSITIONS.log1p())[:, None, None]
    assert rotation_of((vectors(4, seed) * scales).to(dtype), vectors(2, seed).to(dtype), POSITIONS, KNOWN) is None


@settings(derandomize=True)
@given(
    changed=st.sampled_from(["query", "key", "key by position", "other frequencies", "one head", "last dimensions"]),
    seed=st.integers(0, 2**32),
)
def test_what_cannot_be_told_is_refused(changed: str, seed: int) -> None:
    query, key = (turned(vectors(heads, seed), KNOWN[0], False) for heads in (4, 2))
    weights = torch.linspace(0.5, 1.5, HEAD_SIZE, dtype=torch.float64)
    if changed == "query":
        query = query * weights
    elif changed == "key":
        key = key * weights
    elif changed == "key by position":
        key = key * (1 + 0.1 * POSITIONS.log1p())[:, None, None]
    elif changed == "other frequencies":
        query, key = (turned(vectors(heads, seed), 1.01 * KNOWN[0], False) for heads in (4, 2))
    elif changed == "one head":
        key = torch.cat([key[:, :1], vectors(1, seed)], 1)
    else:
        query, key = (turned(vectors(heads, seed), KNOWN[1], False).flip(-1) for heads in (4, 2))
    with pytest.raises(ValueError, match="its queries and keys are not what the model's RoPE makes of them"):
        rotation_of(query.float(), key.float(), POSITIONS, KNOWN)


@settings(derandomize=True)
@given(known=st.integers(0, len(KNOWN) - 1), interleaved=st.booleans(), seed=st.integers(0, 2**32))
def test_a_rotation_is_found_among_float16s_smallest_numbers(known: int, interleaved: bool, seed: int) -> None:
    """What dummy weights make: their rounding is no longer in proportion."""
    before = [(1e-5 * vectors(heads, seed)).half().double() for heads in (4, 2)]
    query, key = (turned(x, KNOWN[known], interleaved).half() for x in before)
    found = rotation_of(query, key, POSITIONS, KNOWN)
    assert found is not None
    assert found.interleaved == interleaved
    assert torch.equal(found.frequencies, KNOWN[known])


@pytest.mark.parametrize("key", ["noise", "zero", "infinite"])
def test_what_says_nothing_is_not_asked(key: str) -> None:
    """The queries tell, with keys whose scores are nothing but noise."""
    query = turned(vectors(4, 1), KNOWN[0], True).half()
    keys = torch.zeros(len(POSITIONS), 2, HEAD_SIZE, dtype=torch.float16)
    if key == "noise":
        keys = 2.0**-24 * torch.randint(-2, 3, keys.shape, generator=torch.Generator().manual_seed(0)).half()
    elif key == "infinite":
        keys[:, :, 3] = float("inf")
    found = rotation_of(query, keys, POSITIONS, KNOWN)
    assert found is not None
    assert found.interleaved
    assert torch.equal(found.frequencies, KNOWN[0])
    for both in (keys, None):
        with pytest.raises(UntoldError, match="not finite, or nothing but the rounding of numbers near zero"):
            rotation_of(keys, both, POSITIONS, KNOWN)


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_a_mismatch_is_refused_beside_heads_that_say_nothing(scale: float) -> None:
    query, key = (scale * turned(vectors(heads, 1), KNOWN[0], False) for heads in (4, 3))
    key = key * torch.linspace(0.5, 1.5, HEAD_SIZE, dtype=torch.float64)
    key[:, 0], key[5, 1, 2] = 0.0, float("nan")
    with pytest.raises(ValueError, match="its queries and keys are not what the model's RoPE makes of them"):
        rotation_of(query.half(), key.half(), POSITIONS, KNOWN)
