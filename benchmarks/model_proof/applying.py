"""What transformers makes of a checkpoint, without vLLM: under `SelfExtend.apply` or as it is."""

from typing import Any

import torch
from transformers import AutoConfig

import vllm_selfextend.transformers as SelfExtend  # noqa: N812  # the authors' name
from tests.support import oracle
from tests.support.batches import greedy
from tests.support.comparison import NEW_TOKENS, Generated
from tests.support.models import TRAINED_LENGTH

from .architectures import BY_TITLE
from .texts import NEIGHBOR_WINDOW, long_texts


@torch.inference_mode()
def extend(title: str, checkpoint: str, extended: bool) -> list[Any]:
    """What the model generated, or the texts with their states or classes.

    Prompts are read one by one, without a cache; answers are written into one, by all prompts at once, padded.

    Raises:
        ValueError: `apply` refuses the model.

    """
    torch.set_num_threads(1)  # tiny products, which threads make slower
    task = BY_TITLE[title].task
    config = AutoConfig.from_pretrained(checkpoint)
    model = oracle.model_class(config).from_pretrained(checkpoint, dtype=torch.float32).eval()
    if extended:
        SelfExtend.apply(model, "auto", NEIGHBOR_WINDOW, trained_length=TRAINED_LENGTH, exact_short=True)
    texts = long_texts()
    outputs = [model(input_ids=torch.tensor([text]), output_hidden_states=True, use_cache=False) for text in texts]
    if task == "embed":
        states = [output.hidden_states[-1][0, -1] for output in outputs]
        return [(text, (state / state.norm()).tolist()) for text, state in zip(texts, states, strict=True)]
    if task == "classify":
        return [(text, one.logits[0].softmax(-1).tolist()) for text, one in zip(texts, outputs, strict=True)]
    model.generation_config.eos_token_id = None  # answers do not end by themselves
    answers = greedy(model, texts, NEW_TOKENS)
    found = []
    for text, output, answer, of_answer in zip(texts, outputs, *answers, strict=True):
        of_prompt = output.logits[0, :-1].log_softmax(-1)
        chosen = torch.cat([of_prompt, of_answer]).gather(1, torch.tensor((text + answer)[1:])[:, None])
        found.append(Generated(text, answer, chosen[:, 0].tolist()))
    return found
