"""An architecture, and the tiny random checkpoint that it is tried with.

A checkpoint has float32 weights, 3 or 4 layers with each kind of layer that the architecture knows, heads of 32
dimensions where that is free, and a trained length of 64 tokens.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tests.support.models import EXPERT_BIASES, random_model, save_tokenizer


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: In vLLM's registry.
        known_as: The families that people know it by.
        config: Makes the checkpoint's config.
        variant: Tells an architecture's rows apart.
        engine: More arguments for vLLM.
        task: "generate", "embed" (the last token's state, normalised) or "classify".
        base: Save the model without its head.
        convert: Turns transformers' checkpoint in a folder into the one that vLLM reads.
        oracle: What the text config that the oracle reads says otherwise.
        served: What the config that vLLM reads says more.
        unbiased: No bias in the choice of experts: vLLM's router for CPUs leaves it out where experts have no groups.
        dtype: The engine's; weights are numbers of that dtype.
        notes: For the table.

    """

    name: str
    known_as: str
    config: Callable[[], PreTrainedConfig]
    variant: str = ""
    engine: Mapping[str, Any] = field(default_factory=dict)
    task: str = "generate"
    base: bool = False
    convert: Callable[[Path], None] | None = None
    oracle: Mapping[str, Any] = field(default_factory=dict)
    served: Mapping[str, Any] = field(default_factory=dict)
    unbiased: bool = False
    dtype: str = "float32"
    notes: str = ""

    @property
    def title(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name

    def save(self, folder: Path) -> tuple[str, str]:
        """Write the checkpoint, the same at every run, and return its path and that of the oracle's."""
        named = getattr(transformers, self.name, None)
        make = AutoModelForCausalLM.from_config if named is None or self.base else named._from_config
        model = random_model(self.config(), seed=len(self.title), make=make)
        if self.dtype != "float32":
            model.to(getattr(torch, self.dtype)).float()
        if self.unbiased:
            for name, tensor in model.state_dict().items():
                if name.endswith(EXPERT_BIASES):
                    tensor.zero_()
        path, for_oracle = folder / "checkpoint", folder / "oracle"
        (model.base_model if self.base else model).save_pretrained(path)
        save_tokenizer(path)
        config_file = path / "config.json"
        config = json.loads(config_file.read_text()) | {"architectures": [self.name]}
        config.get("text_config", {}).pop("architectures", None)  # transformers names a class that has no head
        config_file.write_text(json.dumps(config))
        shutil.copytree(path, for_oracle)
        config.get("text_config", config).update(self.oracle)
        (for_oracle / "config.json").write_text(json.dumps(config))
        if self.served:
            config_file.write_text(json.dumps(json.loads(config_file.read_text()) | self.served))
        if self.convert is not None:
            self.convert(path)
        return str(path), str(for_oracle)
