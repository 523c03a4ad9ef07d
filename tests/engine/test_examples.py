"""The examples as they are. The client's run is in `test_serve`, where its server is; Ray's are in `tests/ray`."""

import json
import re
import socket

from .commands import ROOT, run, try_to_run


def test_offline_batch() -> None:
    with (ROOT / "examples" / "prompts.jsonl").open() as lines:
        keys = [json.loads(line)["key"] for line in lines]
    answers = re.findall(
        r"^([\d,]+) tokens: the key is (.+), the answer (.+)$", run("python examples/offline_batch.py"), re.MULTILINE
    )
    assert [(key, answer) for _, key, answer in answers] == [(key, key) for key in keys]
    assert all(int(tokens.replace(",", "")) > 256 for tokens, _, _ in answers)


def test_transformers_passkey() -> None:
    output = run("python examples/transformers_passkey.py")
    found = {
        name: re.findall(rf"^  {name} +(found|missed) ", output, re.MULTILINE) for name in ("unmodified", "Self-Extend")
    }
    # The last key stands just before the question, where the unmodified model sees it, too.
    assert found == {"unmodified": ["missed"] * 3 + ["found"], "Self-Extend": ["found"] * 4}


def test_the_client_says_that_there_is_no_server() -> None:
    with socket.socket() as nobody_listens:
        nobody_listens.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody_listens.getsockname()[1]}/v1"
        done = try_to_run("python examples/openai_client.py --base-url", url)
    assert done.returncode == 1
    assert done.stdout == ""
    assert (
        done.stderr == f"No server answers at {url}: start one first, as the top of examples/openai_client.py says.\n"
    )
