"""What a vLLM user can do about a text longer than the trained length, each as settings of the engine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..method.plan import CONFIG_KEY
from ..method.rope import rope_parameters
from ..vllm.report import PlanReport, plan_report_and_config


@dataclass(frozen=True)
class Method:
    """How people are shown a method."""

    label: str
    color: str
    marker: str


# Colors that people with any color vision tell apart (Okabe and Ito, 2008).
METHODS = {
    "unmodified": Method("unmodified", "#000000", "s"),
    "yarn": Method("YaRN", "#E69F00", "^"),
    "dynamic": Method("dynamic NTK", "#009E73", "v"),
    "linear": Method("linear", "#CC79A7", "D"),
    "ntk": Method("NTK", "#56B4E9", "P"),
    "self-extend": Method("Self-Extend", "#0072B2", "o"),
}
"""By their names on the command line."""

SCALED = ("yarn", "dynamic", "linear", "ntk")
"""Those that vLLM has by itself: other frequencies for every prompt, whatever its length."""


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a model before it is loaded.

    Attributes:
        report: What Self-Extend would do with it on a server of `max_model_len` tokens.
        rope: Its sets of RoPE parameters.
        is_part: Whether the language model is part of a larger one, with a config of its own.
        hidden_size: The width of its layers.

    """

    report: PlanReport
    rope: list[dict[str, Any]]
    is_part: bool
    hidden_size: int


def read_checkpoint(
    model: str, max_model_len: int, settings: dict[str, Any], engine_args: dict[str, Any]
) -> Checkpoint:
    """Read a checkpoint's config, once.

    Args:
        model: A checkpoint's folder or its name on the Hugging Face hub.
        max_model_len: How many tokens the server is sized for.
        settings: As in `additional_config["self_extend"]`.
        engine_args: Other arguments of vLLM's.

    Raises:
        ValueError: The settings cannot reach `max_model_len`, it is within the trained length, or the config cannot
            be read.
        OSError: There is no such model.

    """
    report, model_config = plan_report_and_config(model, max_model_len, settings, engine_args)
    if max_model_len <= report.trained_length:
        raise ValueError(
            f"{model} was trained for {report.trained_length} tokens, and {max_model_len} are within them: there is "
            "nothing to extend. Ask for more tokens."
        )
    is_part = model_config.hf_config is not model_config.hf_text_config
    rope = list(rope_parameters(model_config.hf_text_config))
    return Checkpoint(report, rope, is_part, model_config.get_hidden_size())


def allowed_methods(
    names: Sequence[str], checkpoint: Checkpoint, settings: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Those of the methods that the checkpoint allows, and why it does not allow the others.

    Raises:
        ValueError: It does not allow Self-Extend.

    """
    allowed, reasons = [], []
    for name in names:
        try:
            engine_arguments(name, checkpoint, settings)
        except ValueError as error:
            if name == "self-extend":
                raise
            reasons.append(str(error))
        else:
            allowed.append(name)
    return allowed, reasons


def engine_arguments(method: str, checkpoint: Checkpoint, settings: dict[str, Any]) -> dict[str, Any]:
    """What to give `vllm.LLM` for a method, and the whole difference between methods.

    Raises:
        ValueError: The checkpoint does not allow the method.

    """
    report = checkpoint.report
    if method == "self-extend":
        if not report.supported:
            raise ValueError(f"Self-Extend cannot serve {report.model}: {report.why_not}")
        return {"attention_backend": "CUSTOM", "additional_config": {CONFIG_KEY: settings}}
    length, served = report.trained_length, report.max_model_len
    if checkpoint.is_part:
        raise ValueError(
            f"The method {method!r} changes a model's config, and that of {report.model} is part of a larger one. "
            "Ask for --method self-extend alone."
        )
    # vLLM must be told that the config allows longer texts, or it refuses them, or reads past the end of its tables.
    longer = {"max_position_embeddings": served}
    if method == "unmodified":
        return {"hf_overrides": longer}
    if len(checkpoint.rope) != 1 or (kind := checkpoint.rope[0].get("rope_type", "default")) != "default":
        found = "several sets of RoPE parameters" if len(checkpoint.rope) != 1 else f"RoPE of type {kind!r}"
        raise ValueError(
            f"The method {method!r} scales a plain RoPE, and {report.model} has {found}. Leave --method {method} out."
        )
    factor = served / length
    rope: dict[str, Any] = {**checkpoint.rope[0], "rope_type": method, "factor": factor}
    if method == "yarn":
        rope["original_max_position_embeddings"] = length
    elif method == "dynamic":
        # The formula's `factor` is for the length a user aims at, and here that is the server's: 1 makes it the
        # authors' NTK-aware base. Without `max_trained_positions` vLLM takes the longer length for the trained one.
        rope |= {"factor": 1.0, "max_trained_positions": length}
    elif method == "linear":
        # vLLM's table has the config's length times the factor.
        while int(length * rope["factor"]) < served:
            rope["factor"] = math.nextafter(rope["factor"], math.inf)
        return {"hf_overrides": {"max_position_embeddings": length, "rope_parameters": rope}}
    return {"hf_overrides": longer | {"rope_parameters": rope}}
