"""What every model is asked, and the numbers that it is extended by."""

from tests.support.comparison import NEW_TOKENS, prompts
from tests.support.models import TRAINED_LENGTH, random_prompts

NEIGHBOR_WINDOW, MAX_MODEL_LEN = 18, 245


def long_texts() -> list[list[int]]:
    """On both sides of the window and of the trained length."""
    return prompts(NEIGHBOR_WINDOW, MAX_MODEL_LEN, block_size=32)


def short_texts() -> list[list[int]]:
    """Within the trained length."""
    return random_prompts((1, 5, 17, 18, 19, 33, TRAINED_LENGTH - NEW_TOKENS), seed=0)
