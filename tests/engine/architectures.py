"""Every decoder architecture of vLLM's registry, as a tiny random checkpoint: what `benchmarks.model_matrix` runs.

A checkpoint has float32 weights, 3 or 4 layers with each kind of layer that the architecture knows, heads of 32
dimensions where that is free, and a trained length of 64 tokens.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .models import CONFIGS, SHAPE, TRAINED_LENGTH, random_model

WIDE: dict[str, Any] = {**SHAPE, "hidden_size": 128}
"""Heads of 32 dimensions also where these are the hidden size's share."""

FULL, SLIDES = "full_attention", "sliding_attention"
SLIDING = {"sliding_window": 24, "layer_types": [SLIDES, FULL, SLIDES]}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
TEXT_ALONE = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
IMAGES_ALONE = {"limit_mm_per_prompt": {"image": 0}}
AUDIO_ALONE = {"limit_mm_per_prompt": {"audio": 0}}


def default_rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **more}}


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: In vLLM's registry.
        known_as: The families that people know it by.
        config: Makes the checkpoint's config; None if transformers has no implementation to compare with.
        variant: Tells an architecture's rows apart.
        engine: More arguments for vLLM.
        task: "generate", "embed" (the last token's state, normalised) or "classify".
        numbers: Group size, neighbor window and `max_model_len`.
        base: Save the model without its head.
        convert: Turns transformers' checkpoint in a folder into the one that vLLM reads.
        notes: For the table.

    """

    name: str
    known_as: str
    config: Callable[[], PreTrainedConfig] | None
    variant: str = ""
    engine: Mapping[str, Any] = field(default_factory=dict)
    task: str = "generate"
    numbers: tuple[int, int, int] = (5, 18, 245)
    base: bool = False
    convert: Callable[[Path], None] | None = None
    notes: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def save(self, folder: Path) -> str:
        """Write the checkpoint, the same at every run, and return its path."""
        assert self.config is not None
        named = getattr(transformers, self.name, None)
        make = AutoModelForCausalLM.from_config if named is None or self.base else named._from_config
        model = random_model(self.config(), seed=len(self.title), make=make)
        path = folder / "checkpoint"
        (model.base_model if self.base else model).save_pretrained(path)
        config_file = path / "config.json"
        config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"architectures": [self.name]}))
        if self.convert is not None:
            self.convert(path)
        return str(path)


def of(config_class: str, *without: str, **values: Any) -> Callable[[], PreTrainedConfig]:
    """A function that makes a config of transformers': the common shape, and these values."""

    def make() -> PreTrainedConfig:
        kept = {name: value for name, value in {**WIDE, **values}.items() if name not in without}
        return getattr(transformers, config_class)(**kept)

    return make


def known(name: str) -> Callable[[], PreTrainedConfig]:
    """One of the models of the tests."""
    return partial(CONFIGS.__getitem__, name)


ARCHITECTURES: list[Architecture] = [
    # Those of the tests, the rotations that reach far among them.
    Architecture("LlamaForCausalLM", "Llama 1, 2, 3, Yi, DeepSeek-Coder, SmolLM2, Tulu", known("llama")),
    Architecture("LlamaForCausalLM", "Llama 3.1, 3.2, 3.3", known("llama3-rope"), variant="llama3 RoPE"),
    Architecture("LlamaForCausalLM", "Yarn-Llama-2", known("yarn-rope"), variant="yarn RoPE"),
    Architecture("LlamaForCausalLM", "models with one head of keys", known("llama-mqa"), variant="multi-query"),
    Architecture("MistralForCausalLM", "Mistral 7B v0.2 and v0.3, Mistral Nemo, Codestral", known("mistral")),
    Architecture("Qwen2ForCausalLM", "Qwen2, Qwen2.5, QwQ-32B, DeepSeek-R1-Distill-Qwen", known("qwen2")),
    Architecture("Qwen3ForCausalLM", "Qwen3 0.6B to 32B", known("qwen3")),
    Architecture("Qwen3ForCausalLM", "Qwen3 as its card says for long texts", of("Qwen3Config", rope_parameters=YARN),
                 variant="yarn RoPE"),
    Architecture("GemmaForCausalLM", "Gemma, CodeGemma", known("gemma")),
    Architecture("Gemma2ForCausalLM", "Gemma 2", known("gemma2")),
    Architecture("Gemma3ForCausalLM", "Gemma 3 270M, 1B", known("gemma3")),
    Architecture("PhiForCausalLM", "Phi-1, 1.5, 2", known("phi")),
    Architecture("Phi3ForCausalLM", "Phi-3, Phi-3.5, Phi-4, with 4K", known("phi3")),
    Architecture("Phi3ForCausalLM", "Phi-3 and 3.5 with 128K, Phi-4-mini", known("longrope"), variant="longrope"),
    Architecture("CohereForCausalLM", "Command R, Aya 23", known("cohere")),
    Architecture("Glm4ForCausalLM", "GLM-4-0414", known("glm4")),
    Architecture("GptOssForCausalLM", "gpt-oss-20b, 120b", known("sinks")),
]  # fmt: skip
