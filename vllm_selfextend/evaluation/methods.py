"""What a vLLM user can do about a text longer than the trained length, each as settings of the engine."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..method.config import SelfExtendConfig
from ..method.plan import CONFIG_KEY
from ..method.rope import rope_parameters
from ..vllm.report import PlanReport, plan_report_and_config


@dataclass(frozen=True, eq=False)
class Method:
    """A method, and how people are shown it.

    Attributes:
        name: Like no other's of a run; what its answers are kept by.
        label: For people.
        color: In pictures.
        marker: In pictures, matplotlib's.
        settings: Of a Self-Extend, as in `additional_config["self_extend"]`; None is another method.

    """

    name: str
    label: str
    color: str
    marker: str
    settings: Mapping[str, Any] | None = None


# Colors that people with any color vision tell apart (Okabe and Ito, 2008).
METHODS = {
    method.name: method
    for method in (
        Method("unmodified", "unmodified", "#000000", "s"),
        Method("yarn", "YaRN", "#E69F00", "^"),
        Method("dynamic", "dynamic NTK", "#009E73", "v"),
        Method("linear", "linear", "#CC79A7", "D"),
        Method("ntk", "NTK", "#56B4E9", "P"),
        Method("self-extend", "Self-Extend", "#0072B2", "o", {}),
    )
}
"""By their names on the command line."""

VARIANT_LOOKS = (("#D55E00", "X"), ("#882255", "*"), ("#44AA99", "h"), ("#999933", "p"))
"""Colors and markers of Self-Extends with settings of their own."""

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


def self_extend_variants(variants: Sequence[Mapping[str, Any]], plain: Mapping[str, Any]) -> Iterator[Method]:
    """A method for each Self-Extend with settings of its own, beside the one that is called just that.

    Args:
        variants: Their settings, as in `additional_config["self_extend"]`.
        plain: Those of that one. The others have its `trained_length`, if they do not say another.

    Raises:
        ValueError: They are too many for a picture, or two have the same settings.

    """
    if len(variants) > len(VARIANT_LOOKS):
        raise ValueError(
            f"--self-extend is given {len(variants)} times; a picture has room for {len(VARIANT_LOOKS)} more methods."
        )
    trained = {name: plain[name] for name in ("trained_length",) if name in plain}
    seen = [dict(plain)]
    for variant, (color, marker) in zip(variants, VARIANT_LOOKS, strict=False):
        settings = {**trained, **variant}
        if settings in seen:
            raise ValueError(
                f"--self-extend '{json.dumps(variant)}' is given twice, or is what --method self-extend has: its "
                "answers would be the same."
            )
        seen.append(settings)
        chosen = ", ".join(f"{name} {json.dumps(value)}" for name, value in variant.items()) or "nothing chosen"
        yield Method(
            f"self-extend {json.dumps(settings, sort_keys=True)}", f"Self-Extend, {chosen}", color, marker, settings
        )


def allowed_methods(methods: Sequence[Method], checkpoint: Checkpoint) -> tuple[list[Method], list[str]]:
    """Those of the methods that the checkpoint allows, and why it does not allow the others.

    Raises:
        ValueError: It does not allow Self-Extend.

    """
    allowed, reasons = [], []
    for method in methods:
        try:
            engine_arguments(method, checkpoint)
        except ValueError as error:
            if method.settings is not None:
                raise
            reasons.append(str(error))
        else:
            allowed.append(method)
    return allowed, reasons


def engine_arguments(method: Method, checkpoint: Checkpoint) -> dict[str, Any]:
    """What to give `vllm.LLM` for a method, and the whole difference between methods.

    Raises:
        ValueError: The checkpoint does not allow the method.

    """
    report = checkpoint.report
    length, served = report.trained_length, report.max_model_len
    name = method.name
    if method.settings is not None:
        if not report.supported:
            raise ValueError(f"Self-Extend cannot serve {report.model}: {report.why_not}")
        settings = {CONFIG_KEY: dict(method.settings)}
        SelfExtendConfig.from_additional_config(settings).plan(length, served)
        return {"attention_backend": "CUSTOM", "additional_config": settings}
    if checkpoint.is_part:
        raise ValueError(
            f"The method {name!r} changes a model's config, and that of {report.model} is part of a larger one. "
            "Ask for --method self-extend alone."
        )
    # vLLM must be told that the config allows longer texts, or it refuses them, or reads past the end of its tables.
    longer = {"max_position_embeddings": served}
    if name == "unmodified":
        return {"hf_overrides": longer}
    if len(checkpoint.rope) != 1 or (kind := checkpoint.rope[0].get("rope_type", "default")) != "default":
        found = "several sets of RoPE parameters" if len(checkpoint.rope) != 1 else f"RoPE of type {kind!r}"
        raise ValueError(
            f"The method {name!r} scales a plain RoPE, and {report.model} has {found}. Leave --method {name} out."
        )
    factor = served / length
    rope: dict[str, Any] = {**checkpoint.rope[0], "rope_type": name, "factor": factor}
    if name == "yarn":
        rope["original_max_position_embeddings"] = length
    elif name == "dynamic":
        # The formula's `factor` is for the length a user aims at, and here that is the server's: 1 makes it the
        # authors' NTK-aware base. Without `max_trained_positions` vLLM takes the longer length for the trained one.
        rope |= {"factor": 1.0, "max_trained_positions": length}
    elif name == "linear":
        # vLLM's table has the config's length times the factor.
        while int(length * rope["factor"]) < served:
            rope["factor"] = math.nextafter(rope["factor"], math.inf)
        return {"hf_overrides": {"max_position_embeddings": length, "rope_parameters": rope}}
    return {"hf_overrides": longer | {"rope_parameters": rope}}
