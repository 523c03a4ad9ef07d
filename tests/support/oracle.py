"""A second oracle that shares no code with the project: `transformers`, eager, scores straight from the paper.

A transformers model computes each layer's queries and keys three times, with its own code: as it is, with queries
rotated to grouped positions, and with keys rotated to grouped positions. For that, the model's rotary function gets
other rows of its cosines and sines; nothing else of the layer's code is changed, so that whatever a model does before
or after the rotation (norms, scales, dimensions left alone) is in the result. This module's attention then picks each
score by `i - j < W`. The whole sequence is computed at once, without a cache.
"""

import contextlib
import copy
import inspect
import math
import sys
from collections import UserDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.utils import ModelOutput

NAME = "self_extend_oracle"
ROTARY_FUNCTIONS = ("apply_rotary_pos_emb", "apply_rotary_emb", "apply_multimodal_rotary_pos_emb")
ROTARY_TABLES = ("cos", "sin", "freqs_cis")
"""Parameters of these functions, positions in their last dimension but one."""

LOCAL_ATTENTION = ("sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class SelfExtend:
    """The paper's numbers; `exact_len` and `log_scale_len` as the project defines them, `group_size=1` no grouping.

    With `group_size` "auto" it follows the query's position, and `exact_len` is the trained length. Queries past
    `log_scale_len` are scaled, which where it is not said is `exact_len`.
    """

    group_size: int | str
    neighbor_window: int
    exact_len: int = 0
    log_scale_len: int | None = None

    @property
    def scale_len(self) -> int:
        return self.exact_len if self.log_scale_len is None else self.log_scale_len

    def eighths(self, position: int) -> int:
        """Eight times the group size of the query at a position."""
        if position < self.exact_len:
            return 8
        if isinstance(self.group_size, int):
            return 8 * self.group_size
        far = 2 * self.exact_len // 3 - self.neighbor_window - 1
        needed = math.ceil(8 * (position - self.neighbor_window) / far)
        return next(
            mantissa << shift for shift in range(60) for mantissa in range(9, 17) if mantissa << shift >= needed
        )


def next_token_logprobs(
    checkpoint: str, sequences: list[list[int]], method: SelfExtend, dtype: torch.dtype = torch.float32
) -> list[np.ndarray]:
    """For each sequence the log-probabilities `[len, vocab]` of the token after each of its tokens, in float32.

    `dtype` is what the model computes in, but for its attention.
    """
    return [
        output.logits[0].float().log_softmax(-1).numpy() for output in _outputs(checkpoint, sequences, method, dtype)
    ]


def hidden_states(checkpoint: str, sequences: list[list[int]], method: SelfExtend) -> list[np.ndarray]:
    """For each sequence what the model makes of each of its tokens, `[len, hidden_size]`, after the last norm."""
    return [output.hidden_states[-1][0].numpy() for output in _outputs(checkpoint, sequences, method)]


def class_logits(checkpoint: str, sequences: list[list[int]], method: SelfExtend) -> list[np.ndarray]:
    """For each sequence a classifier's logits `[classes]`, by its last token."""
    return [output.logits[0].numpy() for output in _outputs(checkpoint, sequences, method)]


def load(checkpoint: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint in transformers, in the class that it names if transformers has it."""
    config = AutoConfig.from_pretrained(checkpoint)
    _take_long_factors(config.get_text_config())
    # Falcon's code computes its eager attention itself, and hands the other to PyTorch.
    attention = "sdpa" if config.model_type == "falcon" else "eager"
    found = model_class(config)
    return found.from_pretrained(checkpoint, config=config, dtype=dtype, attn_implementation=attention).eval()


def model_class(config: Any) -> Any:
    """The class of transformers' that a config names, if it has one; the text model's otherwise."""
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if named is not None and named.__name__.endswith(("ForConditionalGeneration", "ForSequenceClassification")):
        return named
    return AutoModelForCausalLM


def _take_long_factors(config: Any) -> None:
    """Not those for the length of each text: vLLM, serving more than the original length, takes the long ones."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if parameters.get("rope_type") == "longrope":
        parameters["short_factor"] = parameters["long_factor"]


def _outputs(
    checkpoint: str, sequences: list[list[int]], method: SelfExtend, dtype: torch.dtype = torch.float32
) -> Iterator[ModelOutput]:
    AttentionInterface.register(NAME, _interface)
    AttentionMaskInterface.register(NAME, eager_mask)
    model = load(checkpoint, dtype)
    oracle = _Oracle(method)
    with oracle.within(model), torch.inference_mode():
        for tokens in sequences:
            oracle.shared.clear()
            yield model(input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True, return_dict=True)


def _interface(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, **kwargs: Any
) -> Any:
    others = (kwargs.get(name) for name in ("softcap", "s_aux", "sliding_window"))
    return module.oracle.attend(module, query, key, value, attention_mask, scaling, *others)


class _CapturedError(Exception):
    """Ends a layer's second and third run when its queries and keys are there."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor) -> None:
        super().__init__()
        self.query, self.key = query, key


@dataclass
class _Oracle:
    """What the layers of one model share.

    Attributes:
        calls: The arguments of the calls that led to here, innermost last.
        rows: To what positions the rotary function is to rotate; as the model says if None.
        rotated: The modules under way whose code called a rotary function.
        shared: For the second and third run, what layers hand on to later layers (keys, in some models), by run.

    """

    method: SelfExtend
    calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    rows: torch.Tensor | None = None
    run: str = "as it is"
    rotated: set[nn.Module] = field(default_factory=set)
    shared: dict[str, UserDict[Any, Any]] = field(default_factory=dict)

    @contextlib.contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        """Within the context the model's attention is this class's."""
        with contextlib.ExitStack() as stack:
            for one in model.modules():
                one.__dict__["oracle"] = self  # an attribute that is no module
                if hasattr(one, "config") and hasattr(one.config, "_attn_implementation"):
                    stack.enter_context(_implementation(one.config))
                stack.callback(one.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                stack.callback(one.register_forward_hook(self._leave).remove)
            files = {sys.modules[type(one).__module__] for one in model.modules()}
            files = {file for file in files if file.__name__.startswith("transformers.models.")}
            for file in files:
                for name in ROTARY_FUNCTIONS:
                    if hasattr(file, name):
                        stack.enter_context(mock.patch.object(file, name, self._rotary(getattr(file, name))))
                if hasattr(getattr(file, "GPTJAttention", None), "_attn"):  # before transformers 5.24
                    stack.enter_context(mock.patch.object(file.GPTJAttention, "_attn", _gptj_attention))
                if hasattr(file, "FalconAttention"):
                    attend = mock.patch("torch.nn.functional.scaled_dot_product_attention", self._of_pytorch)
                    stack.enter_context(attend)
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append((module, args, kwargs))
        if self.run == "as it is":
            self.rotated.discard(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.calls.pop()

    def _rotary(self, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def rotary(*args: Any, **kwargs: Any) -> Any:
            self.rotated.update(module for module, _, _ in self.calls)
            bound = signature.bind(*args, **kwargs)
            for name in ROTARY_TABLES:
                if name in bound.arguments and self.rows is not None:
                    bound.arguments[name] = bound.arguments[name].index_select(-2, self.rows)
            return function(*bound.args, **bound.kwargs)

        return rotary

    def _again(self, run: str, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of the attention layer under way, rotated to `positions`."""
        depth, (module, args, kwargs) = len(self.calls), self.calls[-1]
        kwargs = {**kwargs, "past_key_values": None} if "past_key_values" in kwargs else kwargs
        if isinstance(shared := kwargs.get("shared_kv_states"), UserDict):
            kept = self.shared.setdefault(run, UserDict())
            kwargs["shared_kv_states"] = kept
            if not kept:
                kept.update(copy.copy(shared))
        # A position past the text's end is one whose score is not chosen.
        self.run, self.rows = run, positions.clamp(max=len(positions) - 1)
        try:
            module(*args, **kwargs)
        except _CapturedError as captured:
            return captured.query, captured.key
        finally:
            self.run, self.rows = "as it is", None
            del self.calls[depth:]
        raise AssertionError("a layer did not attend when it was run once more")

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        sliding_window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`[1, heads, tokens, head_size]` queries, keys and values to `[1, tokens, heads, head_size]`."""
        if self.run != "as it is":
            raise _CapturedError(query, key)
        num_tokens, method = query.shape[2], self.method
        position = torch.arange(num_tokens)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = _scores(query, key, scaling)
        if self.extends(module, sliding_window):
            window = method.neighbor_window
            size = torch.tensor([method.eighths(one) for one in position.tolist()])
            grouped_query, _ = self._again("queries", 8 * position // size + window - 8 * window // size)
            is_neighbor = position[:, None] - position < window
            for one in size[size > 8].unique():
                _, grouped_key = self._again(f"keys at {one}", 8 * position // one)
                is_grouped = ~is_neighbor & (size == one)[:, None]
                scores = torch.where(is_grouped, _scores(grouped_query, grouped_key, scaling), scores)
            if method.scale_len:
                scores = scores * ((position + 1).log() / math.log(method.scale_len)).clamp(min=1.0)[:, None]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(position[:, None] < position, float("-inf"))
        if mask is not None:
            mask = mask[..., :num_tokens]
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        if sinks is not None:  # one more score per head, whose value is nothing
            scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(1, -1, num_tokens, 1)], -1)
        weights = scores.softmax(-1)[..., :num_tokens]
        values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
        return (weights @ values.float()).transpose(1, 2).to(query.dtype), weights

    def extends(self, module: nn.Module, sliding_window: int | None) -> bool:
        """Whether the layer sees the whole context, and rotates."""
        kinds = getattr(getattr(module, "config", None), "layer_types", None)
        index = getattr(module, "layer_idx", None)
        is_local = kinds is not None and index is not None and kinds[index] in LOCAL_ATTENTION
        return self.calls[-1][0] in self.rotated and not (is_local or sliding_window)

    def _of_pytorch(
        self, query: Any, key: Any, value: Any, attn_mask: Any = None, scale: Any = None, **others: Any
    ) -> torch.Tensor:
        return self.attend(self.calls[-1][0], query, key, value, attn_mask, scale)[0].transpose(1, 2)


def _scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    return query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(2, 3) * scaling


def _gptj_attention(self: Any, query: Any, key: Any, value: Any, attention_mask: Any = None) -> Any:
    attended, weights = self.oracle.attend(self, query, key, value, attention_mask, 1.0 / float(self.scale_attn))
    return attended.transpose(1, 2), weights


@contextlib.contextmanager
def _implementation(config: Any) -> Iterator[None]:
    before = config._attn_implementation
    if before == "eager":
        config._attn_implementation = NAME
    yield
    config._attn_implementation = before
