"""Jet-Long's table of Qwen3: `python -m benchmarks.published.qwen3`, of 1.7B unless `--model` says another size."""

from vllm_selfextend.evaluation.methods import METHODS

from .table import Line, Published, ruler_columns, run, self_extend, to_the_letter

TABLE = Published(
    title="Qwen3-1.7B-Base, RULER",
    source="arXiv 2607.07740 (Jet-Long): G 8, W 1,024. Of 4B: 70.1, 80.2, 80.8, 83.0; of 8B: 78.5, 81.1, 84.7, 86.7",
    model="Qwen/Qwen3-1.7B-Base",
    config={
        "model_type": "qwen3",
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    max_model_len=131072,
    columns=ruler_columns(4096, 8192, 16384, 32768, 65536, 131072),
    lines=[
        Line("YaRN", METHODS["yarn"], {"mean": 53.0}),
        Line("Dual Chunk Attention", None, {"mean": 67.8}),
        Line("Self-Extend to the letter", to_the_letter(group_size=8, neighbor_window=1024), {"mean": 67.9}),
        Line("Jet-Long", None, {"mean": 73.9}),
        Line("Self-Extend, the same numbers", self_extend(group_size=8, neighbor_window=1024)),
        Line("Self-Extend, nothing chosen", self_extend()),
    ],
    trained_length=32768,
    has_mean=True,
)

if __name__ == "__main__":
    run(TABLE)
