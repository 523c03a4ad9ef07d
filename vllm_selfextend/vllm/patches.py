"""What of vLLM is touched: every function that is wrapped, and what else is used beyond classes that are imported.

`plugin.register` wraps and checks by these tables; the one in docs/compatibility.md is made of `PATCHES`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Patch:
    """A function of vLLM's that is wrapped; without the backend CUSTOM it does what it did.

    Attributes:
        owner: Its module or class, dotted.
        name: Of the function there.
        wrapper: What takes the original and gives the wrapped one, dotted.
        why: For people.
        ends_with: What vLLM would have to do for it to be no longer needed.
        needs: Parameters that must be there.
        since: The first version of vLLM that has the function, if not all that are supported do.
        only_on: The kind of platform that it is for, if not for all.

    """

    owner: str
    name: str
    wrapper: str
    why: str
    ends_with: str
    needs: tuple[str, ...] = ()
    since: str = ""
    only_on: str = ""

    @property
    def is_needed(self) -> bool:
        """Whether it is to be wrapped here: on this platform, and in this vLLM if it is not in all."""
        from vllm.platforms import current_platform

        if self.only_on and self.only_on != current_platform.device_type:
            return False
        return not self.since or hasattr(resolve_name(self.owner), self.name)

    def apply(self) -> None:
        """Wrap it, once however often it is asked for."""
        wrap(self.owner, self.name, resolve_name(self.wrapper))

    def row(self) -> str:
        """Its line in docs/compatibility.md."""
        last = self.owner.rpartition(".")[2]
        name = f"`{last if last[0].isupper() else self.owner}.{self.name}`"
        where = f", on {self.only_on.upper()}s" if self.only_on else ""
        since = f", since vLLM {self.since}" if self.since else ""
        return f"| {name}{where}{since} | {self.why} | {self.ends_with} |"


PATCHES = (
    Patch(
        "vllm.engine.arg_utils.EngineArgs",
        "create_engine_config",
        "vllm_selfextend.vllm.engine_args.configure_self_extend",
        why="with `CUSTOM` chosen, settles the numbers or refuses, and names the workers that bind the loaded model",
        ends_with="a hook in which a backend sees the finished config, and a loaded model",
    ),
    Patch(
        "vllm.config.model",
        "_get_and_verify_max_len",
        "vllm_selfextend.vllm.engine_args.widen_max_len_check",
        why="lets `--max-model-len` go past the trained length, while an engine with `CUSTOM` is being configured",
        ends_with="a check that asks the backend how far it reaches",
        needs=(
            "max_model_len",
            "model_arch_config",
            "disable_sliding_window",
            "sliding_window",
            "spec_target_max_model_len",
        ),
    ),
    Patch(
        "vllm.config.VllmConfig",
        "_limit_max_model_len_to_draft",
        "vllm_selfextend.vllm.engine_args.limit_to_draft_later",
        why="would cut the served length to a draft's before that has been extended",
        ends_with="the same check, of drafts too",
        since="0.33",
    ),
    Patch(
        "vllm.distributed.kv_transfer.kv_connector.factory.KVConnectorFactory",
        "create_connector",
        "vllm_selfextend.vllm.kv_connectors.tell_layout",
        why="keys that leave the engine go by a name that says what they are",
        ends_with="connectors that keep keys apart by what the backend says they are",
        needs=("config", "role", "kv_cache_config"),
    ),
    Patch(
        "vllm.platforms.cpu.CpuPlatform",
        "get_attn_backend_cls",
        "vllm_selfextend.vllm.engine_args.let_custom_through",
        why="answers `CPU_ATTN` whatever was chosen; lets `CUSTOM` through",
        ends_with="a CPU platform that takes the chosen backend, as those of GPUs do",
        needs=("selected_backend", "attn_selector_config"),
        only_on="cpu",
    ),
)

USED = (
    ("vllm._custom_ops.reshape_and_cache_flash", ("key_cache", "value_cache", "slot_mapping", "kv_cache_dtype")),
    ("vllm.forward_context.set_forward_context", ("attn_metadata", "vllm_config", "num_tokens", "skip_compiled")),
    ("vllm.v1.attention.backend.AttentionBackend.validate_configuration", ()),
    ("vllm.v1.attention.backend.max_decode_query_len", ("vllm_config",)),
    ("vllm.v1.attention.backends.fa_utils.get_flash_attn_version", ("head_size", "requires_softcap")),
    ("vllm.v1.attention.backends.registry.AttentionBackendEnum.CUSTOM", ()),
    ("vllm.v1.kv_cache_interface.KVCacheLayout.LBHNC", ()),
    ("vllm.v1.worker.workspace.WorkspaceManager.get_simultaneous", ()),
)
"""What is called or named beside those, and the parameters that must be there."""


def missing() -> tuple[str, list[str]] | None:
    """The first of all this that is not there, or lacks parameters, with those; None if nothing does."""
    patched = [(f"{one.owner}.{one.name}", one.needs) for one in PATCHES if one.is_needed]
    for name, parameters in (*patched, *USED):
        try:
            found = resolve_name(name)
        except (ImportError, AttributeError):
            return name, []
        if lacking := [one for one in parameters if one not in inspect.signature(found).parameters]:
            return name, lacking
    return None


def wrap(owner: str, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace a function by `wrapper(original)`, once however often it is asked for."""
    holder = resolve_name(owner)
    if getattr(getattr(holder, name), "_self_extend", False):
        return
    original = inspect.getattr_static(holder, name) if inspect.isclass(holder) else getattr(holder, name)
    wrapped = wrapper(original)
    getattr(wrapped, "__func__", wrapped)._self_extend = True
    setattr(holder, name, wrapped)
