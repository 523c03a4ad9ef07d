"""The authors' example on Mistral-7B-Instruct-v0.1: `python -m benchmarks.published.mistral_7b`.

Theirs are five passkeys, in prompts of 9,994 tokens, that the model finds with Self-Extend and not without. RULER's
`niah_single_1` is the same question in other words.
"""

from vllm_selfextend.evaluation.methods import METHODS

from .table import Column, Line, Published, run, self_extend, to_the_letter

TABLE = Published(
    title="Mistral-7B-Instruct-v0.1, keys found",
    source="github.com/datamllab/LongLM, legacy_patch_before_4_38 (passkeys): G 4, W 1,024, sliding window off",
    model="mistralai/Mistral-7B-Instruct-v0.1",
    config={
        "model_type": "mistral",
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    max_model_len=10240,
    columns=[Column("10,240", ["niah_single_1"], 10240)],
    lines=[
        Line("unmodified", METHODS["unmodified"], {"10,240": 0.0}),
        Line("Self-Extend to the letter", to_the_letter(group_size=4, neighbor_window=1024), {"10,240": 100.0}),
        Line("Self-Extend, the same numbers", self_extend(group_size=4, neighbor_window=1024)),
        Line("Self-Extend, nothing chosen", self_extend()),
    ],
    trained_length=8192,
    hf_overrides={"sliding_window": None},
)

if __name__ == "__main__":
    run(TABLE)
