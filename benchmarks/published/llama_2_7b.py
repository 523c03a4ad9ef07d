"""LCEG's line of Self-Extend on Llama-2-7B: `python -m benchmarks.published.llama_2_7b`."""

from .table import Line, Published, ruler_columns, run, self_extend, to_the_letter

TABLE = Published(
    title="Llama-2-7B, RULER",
    source="Lu et al., arXiv 2409.12181 (LCEG): G 64, W 1,024",
    model="meta-llama/Llama-2-7b-hf",
    config={
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
    max_model_len=65536,
    columns=ruler_columns(4096, 8192, 16384, 32768, 65536),
    lines=[
        Line(
            "Self-Extend to the letter",
            to_the_letter(group_size=64, neighbor_window=1024),
            {"4,096": 65.03, "8,192": 50.73, "16,384": 44.02, "32,768": 29.50, "65,536": 9.34},
        ),
        Line("Self-Extend, the same numbers", self_extend(group_size=64, neighbor_window=1024)),
        Line("Self-Extend, nothing chosen", self_extend()),
    ],
)

if __name__ == "__main__":
    run(TABLE)
