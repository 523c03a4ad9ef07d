r"""Ask a server with the `openai` package: for a completion, for a stream, and in a chat.

First the server, in a terminal of its own, until it says "Application startup complete.":

    vllm serve vllm_selfextend/demo/model --served-model-name passkey \
        --attention-backend CUSTOM --max-model-len 4096 --kv-cache-memory-bytes 512M

Then:

    python examples/openai_client.py

It asks for a key that is hidden in 4,000 tokens. The model was trained on 256.
"""

import argparse
import sys

import openai

FILLER = "The grass is green. The sky is blue. The sun is warm today. Here we go. There and back again. "
KEY = "41729"
PROMPT = f"{FILLER * 80}The pass key: Oslo {KEY}. Remember it. {FILLER * 80}What was this number? The pass key: Oslo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://localhost:8000/v1", help="it ends in /v1")
    parser.add_argument("--model", default="passkey", help="what the server calls it")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.base_url, api_key="none")
    try:
        ask(client, args.model)
    except openai.APIConnectionError:
        sys.exit(f"No server answers at {args.base_url}: start one first, as the top of {sys.argv[0]} says.")


def ask(client: openai.OpenAI, model: str) -> None:
    completion = client.completions.create(model=model, prompt=PROMPT, max_tokens=8, stop=".", temperature=0)
    if completion.usage:
        print(f"A key in {completion.usage.prompt_tokens:,} tokens: {KEY}")
    print(f"completion:{completion.choices[0].text}")

    print("stream:", end="")
    for chunk in client.completions.create(
        model=model, prompt=PROMPT, max_tokens=8, stop=".", temperature=0, stream=True
    ):
        print(chunk.choices[0].text, end="", flush=True)
    print()

    chat = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": PROMPT}], max_tokens=8, stop=".", temperature=0
    )
    print(f"chat:{chat.choices[0].message.content}")


if __name__ == "__main__":
    main()
