"""The passkey task: find a number that was said once, somewhere in a long text.

Every word, digit and punctuation mark is one token of the demo model's tokenizer, so a prompt's length in tokens is its
number of words plus one for `<s>`, which the tokenizer puts in front.
"""

import random
from dataclasses import dataclass

CITIES = ("oslo", "paris", "cairo", "lima", "tokyo", "delhi")

FILLER = (
    "the grass is green .",
    "the sky is blue .",
    "the sun is warm today .",
    "here we go .",
    "there and back again .",
    "a bird sings in the old tree .",
    "rain falls on the quiet hills .",
    "the river runs to the sea .",
    "we walk along the long road .",
    "snow lies on the high mountain .",
    "children play in the garden .",
    "the wind moves the tall trees .",
)

DIGITS = tuple("0123456789")
KEY_DIGITS = 5
MAX_KEYS = len(CITIES)


@dataclass(frozen=True)
class PasskeyPrompt:
    """A prompt that ends where the answer should begin.

    Attributes:
        text: The prompt; with `<s>` in front it has exactly the number of tokens asked for.
        answer: The digits of the key that is asked for, with spaces between: `"4 1 7 2 9"`.

    """

    text: str
    answer: str


def vocabulary() -> list[str]:
    """Every word a prompt or an answer can hold, sorted."""
    texts = [*FILLER, *CITIES, *DIGITS, key_sentence("oslo", "0"), question("oslo")]
    return sorted({word for text in texts for word in text.split()})


def make_prompt(num_tokens: int, num_keys: int, depth: float, rng: random.Random) -> PasskeyPrompt:
    """Make a prompt of exactly `num_tokens` tokens (with `<s>`) that hides `num_keys` keys and asks for one of them.

    Args:
        num_tokens: Length of the prompt.
        num_keys: How many cities' keys the text holds, at least 1.
        depth: Where the key that is asked for stands, from 0 (the beginning) to 1 (just before the question). The
            others stand at random places.
        rng: The source of every random choice.

    Raises:
        ValueError: An argument is out of its range, or the keys and the question do not fit into `num_tokens`.

    """
    if not 1 <= num_keys <= MAX_KEYS:
        raise ValueError(f"num_keys is {num_keys}; it must be from 1 to {MAX_KEYS}, the number of cities.")
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is {depth}; it must be from 0 (beginning) to 1 (end).")
    cities = rng.sample(CITIES, num_keys)
    keys = [" ".join(rng.choices(DIGITS, k=KEY_DIGITS)) for _ in cities]
    sentences = [key_sentence(city, key).split() for city, key in zip(cities, keys, strict=True)]
    ending = question(cities[0]).split()
    num_filler = num_tokens - 1 - len(ending) - sum(map(len, sentences))
    if num_filler < 0:
        raise ValueError(
            f"num_tokens is {num_tokens}; {num_keys} key(s) and the question alone take {num_tokens - num_filler}."
        )
    filler = filler_sentences(num_filler, rng)
    # Gaps between filler sentences, 0 being before the first one. The key asked for goes in last, so that depth 0 is
    # the very beginning and depth 1 the very end.
    for sentence in sentences[1:]:
        filler.insert(rng.randint(0, len(filler)), sentence)
    filler.insert(round(depth * len(filler)), sentences[0])
    words = [word for sentence in [*filler, ending] for word in sentence]
    return PasskeyPrompt(text=" ".join(words), answer=keys[0])


def filler_sentences(num_words: int, rng: random.Random) -> list[list[str]]:
    """Random filler of exactly `num_words` words; the first sentence may lack its beginning."""
    sentences: list[list[str]] = []
    missing = num_words
    while missing > 0:
        words = rng.choice(FILLER).split()
        sentences.append(words[-missing:])
        missing -= len(words)
    return sentences[::-1]


def key_sentence(city: str, key: str) -> str:
    """The sentence that says a key."""
    return f"the pass key : {city} {key} . remember it ."


def question(city: str) -> str:
    """The words that ask for a key and begin the answer."""
    return f"what was this number ? the pass key : {city}"
