"""Which decoder architectures of vLLM's Self-Extend serves rightly, found out by running them: docs/models.md."""
