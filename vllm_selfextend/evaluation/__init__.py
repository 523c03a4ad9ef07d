"""How well a method reads: tasks put to a model through vLLM, and what came of it in tables and pictures.

`vllm-selfextend demo`, `evaluate` and `tune` are its uses. What only they need is the extra `eval`.
"""
