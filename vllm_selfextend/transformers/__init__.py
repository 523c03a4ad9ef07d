"""Self-Extend for models of Hugging Face's transformers, without vLLM: the call of the method's authors.

    import vllm_selfextend.transformers as SelfExtend

    SelfExtend.apply(model)  # or with the authors' numbers: apply(model, 8, 1024)
    model.generate(...)
    SelfExtend.remove(model)

Any decoder with RoPE that attends through transformers' `AttentionInterface`; no model class is patched.
"""

from .extension import apply, remove

__all__ = ["apply", "remove"]
