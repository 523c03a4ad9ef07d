"""The authors' picture of Phi-2 on LongBench: `python -m benchmarks.published.phi_2`.

They give `W` 512 (their patch's default) and the length, "8k"; `G` 5 reaches 8,190 tokens.
"""

from vllm_selfextend.evaluation.methods import METHODS

from .table import Column, Line, Published, run, self_extend, to_the_letter

UNMODIFIED = {
    "narrativeqa": 4.46,
    "qasper": 7.01,
    "trec": 50.50,
    "triviaqa": 74.55,
    "repobench-p": 54.14,
    "lcc": 58.96,
    "2wikimqa": 8.55,
    "multifieldqa_en": 19.98,
    "gov_report": 25.46,
    "qmsum": 14.32,
}
EXTENDED = {
    "narrativeqa": 12.04,
    "qasper": 12.10,
    "trec": 60.00,
    "triviaqa": 81.31,
    "repobench-p": 57.05,
    "lcc": 59.42,
    "2wikimqa": 9.68,
    "multifieldqa_en": 20.16,
    "gov_report": 27.51,
    "qmsum": 18.58,
}

TABLE = Published(
    title="Phi-2, LongBench",
    source="github.com/datamllab/LongLM, img/phi2_long_bench.jpg; unmodified: texts cut to 2,048 tokens",
    model="microsoft/phi-2",
    config={
        "model_type": "phi",
        "hidden_size": 2560,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.4,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    max_model_len=8190,
    columns=[Column(name, [f"longbench_{name}"]) for name in UNMODIFIED],
    lines=[
        Line("unmodified", METHODS["unmodified"], UNMODIFIED, max_model_len=2048),
        Line("Self-Extend to the letter", to_the_letter(group_size=5, neighbor_window=512), EXTENDED),
        Line("Self-Extend, the same numbers", self_extend(group_size=5, neighbor_window=512)),
        Line("Self-Extend, nothing chosen", self_extend()),
    ],
)

if __name__ == "__main__":
    run(TABLE)
