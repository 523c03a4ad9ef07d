"""What a dry run has in place of weights and data: a random model of the same kind, and texts that say nothing."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from vllm_selfextend.demo import MODEL_DIR

ENGINE_ARGS = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2 << 30}

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "initializer_range": 0.1}
"""Where the config does not say: heads and positions are the model's own."""

SHORTER = 8
"""What RULER's lengths are divided by."""

WITHOUT_DATA = ("niah_single_1", "niah_multikey_2")
"""What is asked of RULER: tasks whose prompts need no network, and can be as short as that makes them."""

DOCUMENT = {
    "context": "The grass is green. The sky is blue. " * 40,
    "question": "What color is the sky?",
    "answers": ["blue"],
    "all_classes": ["blue", "green"],
}
"""With the fields of LongBench."""


def save_model(config: Mapping[str, Any], folder: Path) -> str:
    """A random checkpoint of a config, with the tokenizer of the demo's model; its folder."""
    path = folder / "model"
    shutil.copytree(MODEL_DIR, path, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    vocabulary = json.loads((MODEL_DIR / "config.json").read_text())["vocab_size"]
    made = AutoConfig.for_model(**{**SMALL, **config, "vocab_size": vocabulary})
    AutoModelForCausalLM.from_config(made).save_pretrained(path)
    return str(path)


def stand_ins(tasks: Sequence[str], folder: Path) -> list[Any]:
    """What the harness is to load: of tasks those that need no network, or all with a document that is here."""
    if found := [task for task in tasks if task in WITHOUT_DATA]:
        return list(found)
    path = folder / "documents.json"
    path.write_text(json.dumps(DOCUMENT))
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": str(path)}}}
    return [{"group": "with_a_document", "task": [{"task": task, **data} for task in tasks]}]
