"""LCEG's lines of Llama-3-8B, unmodified and with Self-Extend: `python -m benchmarks.published.llama_3_8b`."""

from vllm_selfextend.evaluation.methods import METHODS

from .table import Line, Published, ruler_columns, run, self_extend, to_the_letter

TABLE = Published(
    title="Llama-3-8B, RULER",
    source="Lu et al., arXiv 2409.12181 (LCEG): G 32, W 2,048",
    model="meta-llama/Meta-Llama-3-8B",
    config={
        "model_type": "llama",
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    max_model_len=65536,
    columns=ruler_columns(8192, 16384, 32768, 65536),
    lines=[
        Line("unmodified", METHODS["unmodified"], {"8,192": 91.16}, max_model_len=8192),
        Line(
            "Self-Extend to the letter",
            to_the_letter(group_size=32, neighbor_window=2048),
            {"8,192": 84.11, "16,384": 78.78, "32,768": 71.40, "65,536": 38.79},
        ),
        Line("Self-Extend, the same numbers", self_extend(group_size=32, neighbor_window=2048)),
        Line("Self-Extend, nothing chosen", self_extend()),
    ],
)

if __name__ == "__main__":
    run(TABLE)
