"""Tables that others published, measured again: a script each, `python -m benchmarks.published.llama_2_7b` and so on.

They need the weights, a GPU, a network for the harness's data, and `pip install '.[cuda,ruler]' 'lm_eval[longbench]'`.
`--dry-run` tries all of it but the numbers, on a random model of the same kind and made-up data, anywhere.
"""
