import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.evaluation.passkey import ASKED, COMPLETED, PasskeyTask, first_digits, make_text


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def encode(tokenizer):
    return lambda text, answer_begins: tokenizer(f"{text} {answer_begins}")["input_ids"]


def encode_words(text: str, answer_begins: str) -> list[int]:
    return [len(word) for word in f"{text} {answer_begins}".split()]


@given(
    st.integers(1, 6), st.floats(0, 1), st.integers(75, 600), st.integers(0, 2**32), st.sampled_from((ASKED, COMPLETED))
)
def test_a_text_is_as_long_as_whole_sentences_allow(num_keys, depth, num_tokens, seed, wording) -> None:
    num_tokens += 6 * 13 + 30
    made = make_text(num_tokens, num_keys, depth, wording, random.Random(seed), encode_words)
    text, begins, key = made
    longest = max(len(sentence.split()) for sentence in wording.filler)
    assert num_tokens - longest < len(encode_words(text, begins)) <= num_tokens
    assert text.count("Remember it.") == num_keys
    assert wording.statement.format(city=begins.split()[-1], key=key) in text
    assert text.endswith(wording.question)
    assert made == make_text(num_tokens, num_keys, depth, wording, random.Random(seed), encode_words)


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_depth_is_where_the_key_stands(seed: int) -> None:
    begins = []
    for depth in (0.0, 0.5, 1.0):
        text, _, key = make_text(500, 1, depth, COMPLETED, random.Random(seed), encode_words)
        begins.append(text.split().index(f"{key}."))
    assert begins[0] == 4
    assert begins[1] == pytest.approx(250, abs=15)
    assert text.endswith(f"{key}. Remember it. {COMPLETED.question}")


def test_the_demo_model_knows_every_word(tokenizer, encode) -> None:
    text, begins, _ = make_text(300, 6, 0.5, COMPLETED, random.Random(0), encode)
    ids = encode(text, begins)
    assert 290 < len(ids) <= 300
    assert tokenizer.unk_token_id not in ids


def test_what_is_given_twice_is_asked_once() -> None:
    """An answer counted twice makes an interval that is too narrow."""
    once = list(PasskeyTask((200, 400), (0.2, 0.8), (1, 2)).prompts(encode_words))
    assert list(PasskeyTask((400, 200, 400), (0.8, 0.2, 0.8), (2, 1, 1)).prompts(encode_words)) == once
    assert len({prompt.name for prompt in once}) == len(once) == 8


def test_deeper_keys_come_first_and_texts_begin_alike(encode) -> None:
    task = PasskeyTask(lengths=(400, 200), depths=(0.25, 0.75), key_counts=(1, 2), rounds=2)
    prompts = list(task.prompts(encode))
    assert len({prompt.name for prompt in prompts}) == len(prompts) == 16
    cells = [(p.cell["length"], p.cell["num_keys"], p.cell["round"], p.cell["depth"]) for p in prompts]
    assert cells == sorted(cells, key=lambda cell: (*cell[:3], -cell[3]))
    for deep, shallow in zip(prompts[::2], prompts[1::2], strict=True):
        same = next(i for i, (a, b) in enumerate(zip(deep.token_ids, shallow.token_ids, strict=False)) if a != b)
        if deep.cell["num_keys"] == 1:
            assert same > 0.2 * len(deep.token_ids)
        assert len(deep.token_ids) <= deep.cell["length"] - task.answer_tokens
    keys = [prompt.expected for prompt in prompts]
    assert len(set(keys)) == len(keys), "each prompt has a key of its own"


@pytest.mark.parametrize(
    ("answer", "digits"),
    [
        ("The pass key of Oslo is 41729.", "41729"),
        (" 4 1 7 2 9 . remember it", "41729"),
        ("41,729", "41729"),
        ("4 1 7 2 9 9 9", "41729"),
        ("between 3 and 41729", "3"),
        ("I do not know.", ""),
    ],
)
def test_first_digits(answer: str, digits: str) -> None:
    assert first_digits(answer) == digits


def test_bad_arguments_are_named() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="num_keys is 0; it must be from 1 to 6"):
        make_text(300, 0, 0.5, COMPLETED, rng, encode_words)
    with pytest.raises(ValueError, match=r"depth is 1.5; it must be from 0 \(beginning\) to 1 \(end\)"):
        make_text(300, 1, 1.5, COMPLETED, rng, encode_words)
    with pytest.raises(ValueError, match=r"A passkey prompt of 20 tokens is too short: 2 key\(s\) take 22"):
        make_text(20, 2, 0.5, COMPLETED, rng, encode_words)


def test_the_shipped_checkpoint_is_an_ordinary_one() -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(MODEL_DIR)
    assert config.model_type == "llama"
    assert config.max_position_embeddings == 256
