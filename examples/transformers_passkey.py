"""The authors' passkey example with transformers alone, no vLLM: the model before and after `SelfExtend.apply`.

    python examples/transformers_passkey.py

The default model was trained on 256 tokens and is asked for a key in texts of 2,000. For another model:

    python examples/transformers_passkey.py --model MODEL --tokens 12000
"""

import argparse
import random
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import vllm_selfextend.transformers as SelfExtend
from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.evaluation.passkey import COMPLETED, first_digits, make_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_DIR), help="a checkpoint's folder or name")
    parser.add_argument("--tokens", type=int, default=2000, help="of a prompt")
    parser.add_argument("--prompts", type=int, default=4, help="with the key from the beginning to the end")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    prompts = []
    for number in range(args.prompts):
        depth = number / max(args.prompts - 1, 1)
        text, begins, key = make_text(
            args.tokens,
            1,
            depth,
            COMPLETED,
            random.Random(number),
            lambda *parts: tokenizer(" ".join(parts))["input_ids"],
        )
        prompts.append((f"{text} {begins}", key, depth))

    before = ask(model, tokenizer, prompts)
    print(SelfExtend.apply(model))
    after = ask(model, tokenizer, prompts)

    for (text, key, depth), *answers in zip(prompts, before, after, strict=True):
        print(f"\n... {text[-60:]}\nkey {key} at depth {depth:.0%}")
        for name, (answer, seconds) in zip(("unmodified ", "Self-Extend"), answers, strict=True):
            print(f"  {name}  {'found ' if first_digits(answer) == key else 'missed'}  {answer!r}  {seconds:.2f} s")


@torch.inference_mode()
def ask(model: Any, tokenizer: Any, prompts: list[tuple[str, str, float]]) -> list[tuple[str, float]]:
    """The model's answer to each prompt, and the seconds it took."""
    answers = []
    for text, _, _ in prompts:
        inputs = tokenizer(text, return_tensors="pt").to(model.device)
        begin = time.perf_counter()
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8, do_sample=False
        )
        seconds = time.perf_counter() - begin
        answers.append((tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]), seconds))
    return answers


if __name__ == "__main__":
    main()
