"""Small random models of the families that transformers has, their weights large enough that positions matter."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GlmConfig,
    GPTNeoXConfig,
    GraniteConfig,
    HeliumConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    PersimmonConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StableLmConfig,
)

from tests.engine.models import CONFIGS, SHAPE

NO_HEAD_DIM: dict[str, Any] = {
    **{name: value for name, value in SHAPE.items() if name != "head_dim"},
    "hidden_size": 128,
}
NO_KV_HEADS = {name: value for name, value in NO_HEAD_DIM.items() if name != "num_key_value_heads"}


def partial_rope(share: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}


# longrope is refused: transformers chooses its factors anew for every batch.
FAMILIES: dict[str, PreTrainedConfig] = {
    **{name: config for name, config in CONFIGS.items() if name != "longrope"},
    "glm": GlmConfig(**SHAPE, rope_parameters=partial_rope(0.5)),
    "gpt-neox": GPTNeoXConfig(**NO_KV_HEADS, rope_parameters=partial_rope(0.25)),
    "stablelm": StableLmConfig(**NO_HEAD_DIM, rope_parameters=partial_rope(0.25)),
    "olmo2": Olmo2Config(**NO_HEAD_DIM),
    "granite": GraniteConfig(**NO_HEAD_DIM, attention_multiplier=0.2),
    "persimmon": PersimmonConfig(**NO_KV_HEADS, rope_parameters=partial_rope(0.5)),
    "nemotron": NemotronConfig(**SHAPE, rope_parameters=partial_rope(0.5)),
    "helium": HeliumConfig(**{**SHAPE, "hidden_size": 128}),
    # Every token goes to every expert: a choice of experts would turn rounding into other answers.
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=2, sliding_window=None),
}


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model in float32, the same at every call; generation does not stop by itself."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(0.0, 0.3)
            if "sinks" in name:
                parameter.normal_(3.0, 1.0)
    model.generation_config.eos_token_id = None
    return model.eval()


def save_family(name: str, folder: Path) -> str:
    """Write the random model `name` as a checkpoint, if it is not there yet, and return its path."""
    path = folder / name
    if not path.exists():
        random_model(FAMILIES[name], seed=sorted(FAMILIES).index(name)).save_pretrained(path)
    return str(path)
