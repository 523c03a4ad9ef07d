"""Self-Extend for models of Hugging Face's transformers, without vLLM: the call of the method's authors.

    import vllm_selfextend.transformers as SelfExtend

    SelfExtend.apply(model, group_size, window_size)
    model.generate(...)
    SelfExtend.remove(model)

Any decoder with RoPE that attends through transformers' `AttentionInterface`; no model class is patched.
"""

from .extension import apply, remove

__all__ = ["apply", "remove"]
