"""Short ways to write a row of the table.

A row is named by the stem of its class and of its config's: "Qwen3Moe" for Qwen3MoeForCausalLM and Qwen3MoeConfig.
What stands between its families and its keywords are parts of the config, of which a later one goes before; keywords
are about the row, those of `Architecture` among them.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import transformers
from transformers import PreTrainedConfig

from tests.support.models import CONFIGS

from .allowances import NO_IMAGES, NO_IMAGES_OR_VIDEO
from .checkpoint import Architecture
from .parts import WIDE

ConfigMaker = Callable[[], PreTrainedConfig]


def of(config: str, *parts: Mapping[str, Any], without: Collection[str] = ()) -> ConfigMaker:
    """A function that makes a config of transformers': the common shape but some names, and these parts."""

    def make() -> PreTrainedConfig:
        values = dict(WIDE)
        for part in parts:
            values |= part
        kept = {name: value for name, value in values.items() if name not in without}
        return getattr(transformers, f"{config}Config")(**kept)

    return make


def row(
    suffix: str,
    stem: str,
    known_as: str,
    *parts: Mapping[str, Any],
    config: str = "",
    without: Collection[str] = (),
    **of_row: Any,
) -> Architecture:
    """A model of text; `config` is its config's stem where that is another."""
    return Architecture(f"{stem}{suffix}", known_as, of(config or stem, *parts, without=without), **of_row)


causal = partial(row, "ForCausalLM")
latent = partial(row, "ForCausalLM", without={"head_dim"})
"""A model whose cache holds compressed keys."""

embeds = partial(row, "Model", task="embed", base=True)
classifies = partial(row, "ForSequenceClassification", task="classify")


def shared_config(name: str) -> ConfigMaker:
    """Of one of the models that the tests share, by its name there."""
    return partial(CONFIGS.__getitem__, name)


def shared(name: str, stem: str, known_as: str, **of_row: Any) -> Architecture:
    """See `shared_config`."""
    return Architecture(f"{stem}ForCausalLM", known_as, shared_config(name), **of_row)


def with_images(
    stem: str,
    known_as: str,
    text: ConfigMaker,
    tower: Mapping[str, Any],
    *parts: Mapping[str, Any],
    engine: Mapping[str, Any] = NO_IMAGES,
    **of_row: Any,
) -> Architecture:
    """A language model and a vision tower, served with text alone."""

    def make() -> PreTrainedConfig:
        values = {name: value for part in parts for name, value in part.items()}
        config_class = getattr(transformers, f"{stem}Config")
        return config_class(text_config=text().to_dict(), vision_config=dict(tower), **values)

    return Architecture(f"{stem}ForConditionalGeneration", known_as, make, engine=engine, **of_row)


with_video = partial(with_images, engine=NO_IMAGES_OR_VIDEO)
