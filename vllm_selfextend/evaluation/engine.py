"""Puts prompts to a model through vLLM, one engine per method, and hands on each answer as it comes."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..vllm import report
from .methods import Checkpoint, Method, engine_arguments
from .prompts import Encode, Prompt, Row, Task

if TYPE_CHECKING:
    from vllm import LLM

OWN_ARGUMENTS = (
    *report.OWN_ARGUMENTS,
    "attention_config",
    "hf_overrides",
    "worker_cls",
    "kv_transfer_config",
)
"""Arguments of vLLM's that the methods and the other options decide. A KV connector would hand on keys, which are
another method's or other numbers', without a word."""


@contextlib.contextmanager
def running(method: Method, checkpoint: Checkpoint, engine_args: dict[str, Any]) -> "Iterator[LLM]":
    """An engine that serves a checkpoint by a method.

    Eager, since nothing here gains by compiling, and since a captured graph keeps Self-Extend's numbers.

    Args:
        method: How texts longer than the trained length are read.
        checkpoint: What is served.
        engine_args: Other arguments of `vllm.LLM`.

    Raises:
        ValueError: The checkpoint does not allow the method.

    """
    from vllm import LLM
    from vllm.platforms import current_platform

    report = checkpoint.report
    arguments: dict[str, Any] = {"enforce_eager": True, "disable_log_stats": True, "use_tqdm_on_load": False}
    # The loss takes the logits of all tokens of a step, memory that vLLM does not reckon with.
    arguments["max_num_batched_tokens"] = 2048
    per_sequence = report.kv_bytes_per_sequence
    if current_platform.is_cpu():
        # vLLM keeps a core free for its other processes, which have nothing to do here: half of a machine of two.
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    if current_platform.is_cpu() and per_sequence is not None:  # None: not supported, and measured by other methods
        # A CPU's memory is everybody's. Two sequences' worth keep the beginning of the one before.
        arguments["kv_cache_memory_bytes"] = 2 * per_sequence + (64 << 20)
    arguments |= engine_arguments(method, checkpoint) | engine_args
    llm = LLM(model=report.model, max_model_len=report.max_model_len, **arguments)
    try:
        yield llm
    finally:
        # End the engine's processes, so that the next one has the machine to itself.
        llm.llm_engine.engine_core.shutdown(timeout=30)


def ask(llm: "LLM", task: Task, prompts: Iterable[Prompt], on_answer: Callable[[Prompt, Row], None]) -> None:
    """Put prompts of a task to an engine, greedily; `on_answer` gets each prompt and what its answer is worth."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    waiting = {prompt.name: prompt for prompt in prompts}
    engine = llm.llm_engine
    try:
        for name, prompt in waiting.items():
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=task.answer_tokens,
                prompt_logprobs=0 if task.scores_prompt else None,
                logprob_token_ids=list(prompt.choices) or None,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            engine.add_request(name, TokensPrompt(prompt_token_ids=prompt.token_ids), sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                prompt = waiting.pop(output.request_id)
                on_answer(prompt, task.score(prompt, output))
    finally:
        if waiting:
            engine.abort_request(list(waiting))


def prompt_encoder(model: str, engine_args: dict[str, Any], *, chat: bool | None) -> tuple[Encode, Encode, bool]:
    """How a text becomes a prompt, how it becomes bare tokens, and whether the first is through a chat template.

    Args:
        model: A checkpoint's folder or its name on the Hugging Face hub.
        engine_args: Of these `tokenizer`, `trust_remote_code` and `revision` matter.
        chat: Whether to use the model's chat template; None is where it has one.

    Raises:
        ValueError: A chat template is asked for and there is none.

    """
    from transformers import AutoTokenizer

    known = {name: engine_args[name] for name in ("trust_remote_code", "revision") if name in engine_args}
    tokenizer = AutoTokenizer.from_pretrained(engine_args.get("tokenizer", model), **known)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ValueError(f"{model} has no chat template: ask it with --no-chat.")

    def encode(text: str, answer_begins: str) -> list[int]:
        whole = f"{text} {answer_begins}" if answer_begins else text
        token_ids: list[int] = tokenizer(whole, verbose=False)["input_ids"]
        return token_ids

    def encode_chat(text: str, answer_begins: str) -> list[int]:
        message = [{"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        whole += answer_begins
        token_ids: list[int] = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        return token_ids

    use_chat = has_template if chat is None else chat
    return (encode_chat if use_chat else encode), encode, use_chat
