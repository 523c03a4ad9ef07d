"""Which rotation a checkpoint uses, from its Hugging Face config, and the cos/sin rows that go with it.

The frequencies are computed here a second time, on purpose: they are held against the table that vLLM built for the
model (`rotary_modules.py`), so that a rotation misread from a config can never serve.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch

Frequencies: TypeAlias = torch.Tensor
"""`[rotary_dim / 2]`, float32 as vLLM and transformers compute them: radians per position."""


def inverse_frequencies(rope: Mapping[str, Any], rotary_dim: int, *, long_factors: bool = True) -> Frequencies:
    """The frequencies of one set of RoPE parameters, `config.rope_parameters` in transformers.

    Formulas: `transformers.modeling_rope_utils` (linear: kaiokendev; llama3: Llama 3.1 release; yarn: Peng et al.,
    arXiv 2309.00071; longrope: Ding et al., arXiv 2402.13753; proportional: Gemma 4, a part of whose pairs has
    frequency 0).

    Args:
        rope: The parameters; `rope_type` is one of `SUPPORTED_ROPE_TYPES`.
        rotary_dim: How many dimensions of a head are rotated.
        long_factors: longrope's factors, which vLLM uses for every `max_model_len` past the original length; False is
            the short ones.

    Raises:
        ValueError: The rope type is not supported.

    """
    base = float(rope.get("rope_theta", 10000.0))
    plain: Frequencies = 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    rope_type = rope.get("rope_type", "default")
    if rope_type == "default":
        return plain
    if rope_type == "linear":
        return plain / float(rope["factor"])
    if rope_type == "llama3":
        return _llama3(plain, rope)
    if rope_type == "yarn":
        return _yarn(plain, rope, base, rotary_dim)
    if rope_type == "proportional":
        is_rotated = torch.arange(len(plain)) < int(rope.get("partial_rotary_factor", 1.0) * rotary_dim // 2)
        return torch.where(is_rotated, plain, 0.0) / float(rope.get("factor") or 1.0)
    if rope_type == "longrope":
        return plain / torch.tensor(rope["long_factor" if long_factors else "short_factor"], dtype=torch.float32)
    raise ValueError(unsupported_rope_type(rope_type))


_NEEDED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("long_factor", "original_max_position_embeddings"),
}
_OPTIONAL = ("rope_theta", "partial_rotary_factor", "factor", "beta_fast", "beta_slow")
"""Numbers of RoPE parameters, by their rope type, and of any type."""

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope", "proportional")


def unsupported_rope_type(rope_type: str) -> str:
    """Why a rope type cannot work, as a sentence."""
    known = ", ".join(SUPPORTED_ROPE_TYPES)
    if rope_type in ("dynamic", "ntk-dynamic"):
        return (
            f"its RoPE is {rope_type!r} (dynamic NTK): the frequencies move with the length, so how far a cached key "
            f"is to be turned is not known. Supported are {known}. Without its own extension it can be served: "
            '--hf-overrides \'{"rope_parameters": {"rope_type": "default", "rope_theta": ...}}\', '
            "with its own rope_theta."
        )
    return f"its RoPE type {rope_type!r} is not supported. Supported are {known}."


def rope_parameters(hf_text_config: Any) -> Iterator[dict[str, Any]]:
    """The sets of RoPE parameters of a config: one, or one per layer type (Gemma 3).

    Reads `rope_parameters` as transformers 5 and vLLM's config loader (`patch_rope_parameters`) leave it.

    Raises:
        ValueError: A number is missing, or is none.

    """
    parameters = getattr(hf_text_config, "rope_parameters", None) or {}
    if not parameters and getattr(hf_text_config, "rotary_dim", None):  # GPT-J, whose config says no more than that
        parameters = {"rope_type": "default"}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    for one in nested or ([parameters] if parameters else []):
        one = dict(one)
        if one.get("rope_type") in ("longrope", "yarn", "llama3"):
            original = getattr(hf_text_config, "original_max_position_embeddings", None)
            one.setdefault("original_max_position_embeddings", original or hf_text_config.max_position_embeddings)
        _check_numbers(one)
        yield one


def uses_alibi(config: Any) -> bool:
    """Whether a config asks for a bias by distance (ALiBi) in the place of a rotation."""
    attn_config = getattr(config, "attn_config", None) or {}
    in_attn_config = attn_config.get("alibi") if isinstance(attn_config, dict) else getattr(attn_config, "alibi", False)
    return bool(
        getattr(config, "alibi", False)
        or in_attn_config
        or getattr(config, "position_embedding_type", None) == "alibi"
        or config.model_type == "bloom"
    )


def _check_numbers(rope: Mapping[str, Any]) -> None:
    """Refuse RoPE parameters that `inverse_frequencies` cannot calculate with; configs are written by hand, too.

    Raises:
        ValueError: One is missing, or is no number above 0.

    """
    rope_type = rope.get("rope_type", "default")
    needed = _NEEDED.get(rope_type, ())
    given = [name for name in _OPTIONAL if rope.get(name) is not None or (name == "rope_theta" and name in rope)]
    for name in (*needed, *given):
        value = rope.get(name)
        numbers: list[Any] = value if name == "long_factor" and isinstance(value, list) and value else [value]
        if not all(_is_number(number) and number > 0 for number in numbers):
            raise ValueError(
                f"its RoPE of type {rope_type!r} has {name} {value!r} in the config; it must be a number above 0"
                f"{', or a list of them' if name == 'long_factor' else ''}."
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def cos_sin(frequencies: Frequencies, start: int, stop: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows `start .. stop - 1` of cosines, then sines: `[stop - start, rotary_dim]`, angles computed in float64."""
    angles = torch.arange(start, stop, dtype=torch.float64)[:, None] * frequencies.to("cpu", torch.float64)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def _llama3(plain: Frequencies, rope: Mapping[str, Any]) -> Frequencies:
    original = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = original * plain / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0) if high != low else (turns >= high).float()
    frequencies: Frequencies = plain * (smooth + (1 - smooth) / rope["factor"])
    return frequencies


def _yarn(plain: Frequencies, rope: Mapping[str, Any], base: float, rotary_dim: int) -> Frequencies:
    original = rope["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        """The dimension whose wave turns so often within the original length."""
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = (torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)
    stretched = ramp.clamp(0.0, 1.0)
    frequencies: Frequencies = plain * (1 - stretched) + plain / rope["factor"] * stretched
    return frequencies
