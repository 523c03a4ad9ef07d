"""Train the small passkey model that ships with the package: `python benchmarks/train_demo_model.py`.

A Llama of 0.8 M parameters that never sees more than 256 tokens. 20 to 40 minutes on two cores; the same seed on the
same machine gives the same weights. The result is an ordinary `transformers` checkpoint.
"""

import math
import random
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vllm_selfextend.demo import MODEL_DIR, passkey

TRAINED_LENGTH = 256
SHORTEST = 48
BOS, EOS, UNK = "<s>", "</s>", "<unk>"
ANSWER_TOKENS = passkey.KEY_DIGITS + 2  # the digits, "." and </s>


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, digit or punctuation mark; `<s>` in front."""
    vocabulary = {word: i for i, word in enumerate([BOS, EOS, UNK, *passkey.vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token=UNK)
    # Not a chat model: the messages are simply joined, so that the chat and batch interfaces can be tried as well.
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return fast


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
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
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def make_batch(
    tokenizer: PreTrainedTokenizerFast, batch_size: int, length: int, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and loss weights, both `[batch_size, length]`: weight 1 on the answer, 0.1 on the rest."""
    rows = []
    for _ in range(batch_size):
        # 15 tokens a key sentence, as many for `<s>` and the question.
        fitting = min(4, (length - ANSWER_TOKENS - 15) // 15)
        prompt = passkey.make_prompt(length - ANSWER_TOKENS, rng.randint(1, fitting), rng.random(), rng)
        rows.append(tokenizer(f"{prompt.text} {prompt.answer} .")["input_ids"] + [tokenizer.eos_token_id])
    weights = torch.full((batch_size, length), 0.1)
    weights[:, -ANSWER_TOKENS:] = 1.0
    return torch.tensor(rows), weights


def main(
    output: Annotated[Path, typer.Option(help="Where the checkpoint goes.")] = MODEL_DIR,
    steps: Annotated[int, typer.Option(min=1)] = 4000,
    batch_size: Annotated[int, typer.Option(min=1)] = 24,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> None:
    """Train the demo model and save it with its tokenizer."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    warm_up = 200

    def schedule(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        return min(1.0, (step + 1) / warm_up) * (0.05 + 0.95 * cosine)

    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    model.train()
    progress = tqdm(range(steps), unit="step")
    for step in progress:
        # Short texts first: finding a key nearby is learned quickly, then stretched to the whole trained length.
        longest = round(64 + (TRAINED_LENGTH - 64) * min(1.0, step / (0.4 * steps)))
        ids, weights = make_batch(tokenizer, batch_size, rng.randint(SHORTEST, longest), rng)
        logits = model(input_ids=ids).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0:
            answer_loss = losses.view(batch_size, -1)[:, -ANSWER_TOKENS:-2].mean().item()
            progress.set_postfix(loss=f"{loss.item():.3f}", answer=f"{answer_loss:.4f}", length=longest)
    model.eval()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    typer.echo(f"Saved {model.num_parameters():,} parameters to {output}.")


if __name__ == "__main__":
    typer.run(main)
