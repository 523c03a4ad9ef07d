"""Small random models of the families that transformers has, their weights large enough that positions matter."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CodeGenConfig,
    GPTJConfig,
    GPTNeoXConfig,
    NemotronConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    StableLmConfig,
)

from benchmarks.model_proof.architectures import BY_TITLE
from tests.support.models import CONFIGS, SHAPE

NO_HEAD_DIM: dict[str, Any] = {
    **{name: value for name, value in SHAPE.items() if name != "head_dim"},
    "hidden_size": 128,
}
NO_KV_HEADS = {name: value for name, value in NO_HEAD_DIM.items() if name != "num_key_value_heads"}


def partial_rope(share: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}


def one_set_of_factors(config: Phi3Config) -> Phi3Config:
    """The long factors for short texts too, as vLLM takes them; else transformers chooses anew for every batch."""
    rope = {**config.rope_parameters, "short_factor": config.rope_parameters["long_factor"]}
    return Phi3Config(**{**config.to_dict(), "rope_parameters": rope})


def gptj(num_positions: int) -> GPTJConfig:
    return GPTJConfig(**{**NO_KV_HEADS, "max_position_embeddings": num_positions}, rotary_dim=16, n_inner=96)


# What each has that those before it do not; the other architectures are in `make models`.
FAMILIES: dict[str, PreTrainedConfig] = {
    **CONFIGS,
    "longrope": one_set_of_factors(CONFIGS["longrope"]),
    "gpt-neox": GPTNeoXConfig(**NO_KV_HEADS, rope_parameters=partial_rope(0.25)),
    "stablelm": StableLmConfig(**NO_HEAD_DIM, rope_parameters=partial_rope(0.25)),
    "nemotron": NemotronConfig(**SHAPE, rope_parameters=partial_rope(0.5)),
    "olmo2": Olmo2Config(**NO_HEAD_DIM),
    "falcon": BY_TITLE["FalconForCausalLM"].config(),  # attends by itself
    "gptj": gptj(256),  # attends by itself, and has a table
    "smollm3": BY_TITLE["SmolLM3ForCausalLM"].config(),  # layers without RoPE
    "ministral3": BY_TITLE["Ministral3ForCausalLM"].config(),  # queries that grow with their position
    "gemma3n": BY_TITLE["Gemma3nForCausalLM"].config(),  # layers that attend to another one's keys
    "gemma4": BY_TITLE["Gemma4ForCausalLM"].config(),  # the same, found by the kind of layer
    "qwen3.5": BY_TITLE["Qwen3_5ForCausalLM"].config(),  # gated delta layers, M-RoPE
    "qwen2-vl": BY_TITLE["Qwen2VLForConditionalGeneration"].config(),  # a text model beside others
}
if Version(transformers.__version__) >= Version("5.24"):  # before, its code attends by itself, and `apply` refuses it
    FAMILIES["codegen"] = CodeGenConfig(**{**NO_KV_HEADS, "max_position_embeddings": 256}, rotary_dim=16, n_inner=96)


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model in float32, the same at every call; generation does not stop by itself."""
    torch.manual_seed(seed)
    reads_more = config.get_text_config() is not config
    auto_class = AutoModelForImageTextToText if reads_more else AutoModelForCausalLM
    # The model would change the config of those after it: an extended one writes its attention there.
    model = auto_class.from_config(copy.deepcopy(config), dtype=torch.float32)
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
