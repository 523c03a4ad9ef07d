"""The method: positions, the user's settings, what follows from them, rotations. No vLLM, transformers or kernels."""
