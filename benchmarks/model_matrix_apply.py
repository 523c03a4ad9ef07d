"""The matrix's other host: what `SelfExtend.apply` makes of a checkpoint, in transformers and without vLLM."""

from typing import Any

import torch
from transformers import AutoConfig

import vllm_selfextend.transformers as SelfExtend  # noqa: N812  # the authors' name
from tests.engine.architectures import BY_TITLE
from tests.support import oracle
from tests.support.comparison import NEW_TOKENS, Generated
from tests.support.models import SHAPE, TRAINED_LENGTH
from vllm_selfextend.method.positions import GroupSize

PAD = SHAPE["pad_token_id"]


@torch.inference_mode()
def extend(title: str, checkpoint: str, texts: list[list[int]], numbers: tuple[GroupSize, int] | None) -> list[Any]:
    """What the model generated, or the texts with their states or classes; `numbers` are the group size and the window.

    Prompts are read one by one, without a cache; answers are written into one, by all prompts at once, padded.

    Raises:
        ValueError: `apply` refuses the model.

    """
    torch.set_num_threads(1)  # tiny products, which threads make slower
    task = BY_TITLE[title].task
    config = AutoConfig.from_pretrained(checkpoint)
    model = oracle.model_class(config).from_pretrained(checkpoint, dtype=torch.float32).eval()
    if numbers:
        SelfExtend.apply(model, *numbers, trained_length=TRAINED_LENGTH, exact_short=True)
    outputs = [model(input_ids=torch.tensor([text]), output_hidden_states=True, use_cache=False) for text in texts]
    if task == "embed":
        states = [output.hidden_states[-1][0, -1] for output in outputs]
        return [(text, (state / state.norm()).tolist()) for text, state in zip(texts, states, strict=True)]
    if task == "classify":
        return [(text, one.logits[0].softmax(-1).tolist()) for text, one in zip(texts, outputs, strict=True)]
    found = []
    for text, output, answer, of_answer in zip(texts, outputs, *_generate(model, texts), strict=True):
        of_prompt = output.logits[0, :-1].log_softmax(-1)
        chosen = torch.cat([of_prompt, of_answer]).gather(1, torch.tensor((text + answer)[1:])[:, None])
        found.append(Generated(text, answer, chosen[:, 0].tolist()))
    return found


def _generate(model: Any, texts: list[list[int]]) -> tuple[list[list[int]], torch.Tensor]:
    """Greedily, with padding on the left: the answers, and the log-probabilities `[texts, tokens, vocabulary]`."""
    longest = max(map(len, texts))
    tokens = torch.tensor([[PAD] * (longest - len(text)) + text for text in texts])
    model.generation_config.eos_token_id = None  # answers do not end by themselves
    output = model.generate(
        input_ids=tokens,
        attention_mask=torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts]),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, longest:].tolist(), torch.stack(output.logits, 1).log_softmax(-1)
