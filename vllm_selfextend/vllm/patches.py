"""What of vLLM is touched: every function that is wrapped, and what else is used beyond classes that are imported.

`plugin.register` wraps and checks by these tables; the one in docs/compatibility.md is made of `PATCHES`.
"""

import functools
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
        of_cpus: Whether it is a method of the platform, for CPUs alone.

    """

    owner: str
    name: str
    wrapper: str
    why: str
    ends_with: str
    needs: tuple[str, ...] = ()
    since: str = ""
    of_cpus: bool = False

    @property
    def holder(self) -> Any:
        """The module or class; None if there is nothing to wrap, on this platform or in this version of vLLM.

        Raises:
            ImportError: There is no such module.
            AttributeError: It has no such class.

        """
        from vllm.platforms import current_platform

        if self.of_cpus:  # the class that runs may be one below it
            return type(current_platform) if current_platform.is_cpu() else None
        holder = resolve_name(self.owner)
        return holder if not self.since or hasattr(holder, self.name) else None

    def apply(self) -> None:
        """Wrap it, if there is something to wrap, once however often it is asked for."""
        if (holder := self.holder) is not None:
            wrap(holder, self.name, resolve_name(self.wrapper))

    def row(self) -> str:
        """Its line in docs/compatibility.md."""
        last = self.owner.rpartition(".")[2]
        name = f"`{last if last[0].isupper() else self.owner}.{self.name}`"
        where = ", on CPUs" if self.of_cpus else ""
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
        "vllm.v1.metrics.loggers.StatLoggerManager",
        "__init__",
        "vllm_selfextend.vllm.metrics.count_group_sizes",
        why="with `CUSTOM` chosen, adds the histogram of group sizes to `/metrics`",
        ends_with="plugins' loggers that do not turn statistics on where a user turned them off",
        needs=("vllm_config", "engine_idxs", "custom_stat_loggers"),
    ),
    Patch(
        "vllm.platforms.cpu.CpuPlatform",
        "get_attn_backend_cls",
        "vllm_selfextend.vllm.engine_args.let_custom_through",
        why="answers `CPU_ATTN` whatever was chosen; lets `CUSTOM` through",
        ends_with="a CPU platform that takes the chosen backend, as those of GPUs do",
        needs=("selected_backend", "attn_selector_config"),
        of_cpus=True,
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
    patched = [(f"{one.owner}.{one.name}", one.needs, functools.partial(_find, one)) for one in PATCHES]
    used = [(name, parameters, functools.partial(resolve_name, name)) for name, parameters in USED]
    for name, parameters, find in (*patched, *used):
        try:
            found = find()
        except (ImportError, AttributeError):
            return name, []
        if found is not None and (lacking := _lacking(found, parameters)):
            return name, lacking
    return None


def _find(patch: Patch) -> Any:
    """The function as it is; None if there is nothing to wrap."""
    return None if (holder := patch.holder) is None else getattr(holder, patch.name)


def _lacking(found: Any, parameters: tuple[str, ...]) -> list[str]:
    """Which parameters something has not."""
    return [name for name in parameters if name not in inspect.signature(found).parameters]


def wrap(holder: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Replace a function of a module or class by `wrapper(original)`, once however often it is asked for."""
    if getattr(getattr(holder, name), "_self_extend", False):
        return
    original = inspect.getattr_static(holder, name) if inspect.isclass(holder) else getattr(holder, name)
    wrapped = wrapper(original)
    getattr(wrapped, "__func__", wrapped)._self_extend = True
    setattr(holder, name, wrapped)
