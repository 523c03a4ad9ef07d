"""How the toy models learn: a Llama of 0.8 M parameters, on texts of 256 tokens at most whose answers are marked."""

import json
import math
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TRAINED_LENGTH = 256
SHORTEST = 100
BOS, EOS, UNK = "<s>", "</s>", "<unk>"
OTHER_WEIGHT = 0.05  # of a token that belongs to no answer, in the loss
FIRST_WEIGHT = 3.0  # added for an answer's first token

# The filler of the evaluation's tasks is among these.
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is warm today.",
    "Here we go.",
    "There and back again.",
    "A bird sings in the old tree.",
    "Rain falls on the quiet hills.",
    "The river runs to the sea.",
    "We walk along the long road.",
    "Snow lies on the high mountain.",
    "Children play in the garden.",
    "The wind moves the tall trees.",
)

Example: TypeAlias = tuple[list[str], list[bool]]
"""The words of a training text, and which belong to an answer."""

MakeExample: TypeAlias = Callable[[int, random.Random], Example]
"""Makes one of so many tokens, `<s>` and `</s>` included."""


def words(text: str) -> list[str]:
    """What the tokenizer makes of a text: words, digits and punctuation marks."""
    return re.findall(r"[a-z]+|\d|[^\w\s]", text.lower())


def filler_sentences(num_words: int, rng: random.Random) -> list[list[str]]:
    """Random filler of exactly `num_words` words; the first sentence may lack its beginning."""
    sentences: list[list[str]] = []
    missing = num_words
    while missing > 0:
        sentence = words(rng.choice(FILLER))
        sentences.append(sentence[-missing:])
        missing -= len(sentence)
    return sentences[::-1]


def example_of(text: Iterable[list[str]], questions: Iterable[list[str]], answers: Iterable[list[str]]) -> Example:
    """Sentences, and after them each question with its answer."""
    example = [word for sentence in text for word in sentence]
    is_answer = [False] * len(example)
    for question, answer in zip(questions, answers, strict=True):
        example += question + answer
        is_answer += [False] * len(question) + [True] * len(answer)
    return example, is_answer


def train(
    output: Path,
    make_example: MakeExample,
    texts: Iterable[str],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Train a model and save it with its tokenizer. The same seed on the same machine gives the same weights.

    Args:
        output: The folder.
        make_example: What it learns from.
        texts: They hold every word of an example, but those of the filler.
        steps: Batches.
        batch_size: Examples, all of one length.
        learning_rate: The highest; it rises for 100 steps and falls along a cosine.
        seed: Of weights and examples.

    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = _make_tokenizer(sorted({word for text in [*FILLER, *texts] for word in words(text)}))
    model = _make_model(tokenizer)
    warm_up = 100

    def schedule(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        return min(1.0, (step + 1) / warm_up) * (0.05 + 0.95 * cosine)

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    progress = tqdm(range(steps), unit="step")
    for step in progress:
        # Short texts first: finding something nearby is learned quickly, then stretched to the whole trained length.
        longest = round(125 + (TRAINED_LENGTH - 125) * min(1.0, step / (0.6 * steps)))
        ids, is_answer = _make_batch(tokenizer, make_example, batch_size, rng.randint(SHORTEST, longest), rng)
        logits = model(input_ids=ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        # An answer's first token is where what was said has to be told apart; the others follow from it.
        is_first = (is_answer[:, 1:] & ~is_answer[:, :-1]).flatten()
        is_answer = is_answer[:, 1:].flatten()
        weights = torch.where(is_answer, 1.0, OTHER_WEIGHT) + FIRST_WEIGHT * is_first
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 20 == 0:
            right = (logits.flatten(0, 1).argmax(-1) == ids[:, 1:].flatten())[is_first].float().mean().item()
            progress.set_postfix(first_token_right=f"{right:.2f}", loss=f"{loss.item():.3f}", longest=longest)
    model.eval()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    # transformers 5 writes a class name that version 4 does not know; this one both do.
    settings_file = output / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings_file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    print(f"Saved {model.num_parameters():,} parameters to {output}.")


def _make_tokenizer(vocabulary: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token a word, digit or punctuation mark; `<s>` in front."""
    ids = {word: i for i, word in enumerate([BOS, EOS, UNK, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNK)
    # Not a chat model: the messages are simply joined, so that the chat and batch interfaces can be tried as well.
    fast.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return fast


def _make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=TRAINED_LENGTH,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    # As large as what the layers add, or the words drown in it and attention learns to tell them apart late.
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    return model


def _make_batch(
    tokenizer: PreTrainedTokenizerFast, make_example: MakeExample, batch_size: int, length: int, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and whether each belongs to an answer, both `[batch_size, length]`."""
    ids, answers = [], []
    for _ in range(batch_size):
        example, is_answer = make_example(length, rng)
        ids.append(tokenizer(" ".join(example))["input_ids"] + [tokenizer.eos_token_id])
        answers.append([False, *is_answer, True])
    return torch.tensor(ids), torch.tensor(answers)
