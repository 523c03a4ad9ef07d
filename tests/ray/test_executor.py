"""vLLM's Ray executor, which wants GPUs, on CPUs that stand in for them (`stand_in_gpus`)."""

from typing import Any

import vllm_selfextend

from .programs import run_engine
from .prompts import PROMPTS


def test_two_actors_give_the_tokens_of_one_engine(plain: dict[str, Any]) -> None:
    found = run_engine("ray", [prompt["prompt"] for prompt in PROMPTS])
    assert found["tokens"] == plain["tokens"]
    assert [text.strip()[:9] for text in found["texts"]] == [prompt["key"] for prompt in PROMPTS]

    assert len(found["workers"]) == 2
    assert len({worker["actor"] for worker in found["workers"]} - {None}) == 2, "two actors of Ray's"
    for worker in found["workers"]:
        assert worker["attention"] == ["SelfExtendImpl"] * 4
        assert worker["query_heads"] == [2] * 4, "half of the model's"
        assert worker["package"] == vllm_selfextend.__file__
