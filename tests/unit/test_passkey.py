import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from vllm_selfextend.demo import MODEL_DIR, passkey


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@given(st.integers(1, 4), st.floats(0, 1), st.integers(75, 600), st.integers(0, 2**32))
def test_length_and_answer(num_keys: int, depth: float, num_tokens: int, seed: int) -> None:
    prompt = passkey.make_prompt(num_tokens, num_keys, depth, random.Random(seed))
    words = prompt.text.split()
    assert len(words) + 1 == num_tokens
    assert set(words) <= set(passkey.vocabulary())
    assert prompt.text.count("remember it") == num_keys
    assert f"the pass key : {words[-1]} {prompt.answer} ." in prompt.text
    assert prompt == passkey.make_prompt(num_tokens, num_keys, depth, random.Random(seed))


def test_a_word_is_a_token(tokenizer) -> None:
    prompt = passkey.make_prompt(300, 4, 0.5, random.Random(0))
    ids = tokenizer(prompt.text)["input_ids"]
    assert len(ids) == 300
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt.text


def test_people_write_differently(tokenizer) -> None:
    as_made = tokenizer("the pass key : oslo 4 1 7 2 9 . remember it .")["input_ids"]
    assert tokenizer("The pass key: Oslo 41729. Remember it.")["input_ids"] == as_made


def test_depth_is_where_the_key_stands() -> None:
    for depth, where in ((0.0, 0), (1.0, 1)):
        prompt = passkey.make_prompt(500, 1, depth, random.Random(1))
        begin = prompt.text.split().index("pass")
        assert begin == (1 if where == 0 else 499 - 10 - 14 + 1)


def test_bad_arguments_are_named() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="num_keys is 0; it must be from 1 to 6"):
        passkey.make_prompt(300, 0, 0.5, rng)
    with pytest.raises(ValueError, match=r"depth is 1.5; it must be from 0 \(beginning\) to 1 \(end\)"):
        passkey.make_prompt(300, 1, 1.5, rng)
    with pytest.raises(ValueError, match=r"num_tokens is 30; 2 key\(s\) and the question alone take 39"):
        passkey.make_prompt(30, 2, 0.5, rng)


def test_the_shipped_checkpoint_is_an_ordinary_one() -> None:
    config = AutoConfig.from_pretrained(MODEL_DIR)
    assert config.model_type == "llama"
    assert config.max_position_embeddings == 256
