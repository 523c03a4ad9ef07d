"""The tables of the front page and of `docs/results.md` are what the kept results say."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from benchmarks import gpu_prediction
from vllm_selfextend.evaluation.intervals import Estimate, share
from vllm_selfextend.evaluation.prompts import Row
from vllm_selfextend.evaluation.ruler import RULER_TASKS
from vllm_selfextend.evaluation.summary import ruler_score, share_kept, task_share
from vllm_selfextend.evaluation.tables import percent

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FRONT = ROOT / "README.md"
PAGE = ROOT / "docs" / "results.md"
RULER_DONE = ("niah_single_1", "ruler_fwe")
METHODS = ("unmodified", "yarn", "self-extend")


def kept(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return results


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def sentences(page: Path) -> str:
    """A page in one line: where its lines end says nothing."""
    return " ".join(page.read_text(encoding="utf-8").split())


def keys_found(results: dict[str, Any], method: str, *lengths: int) -> str:
    found = [
        row["found"]
        for row in results["answers"]
        if (row["method"], row.get("length")) in {(method, length) for length in lengths} and row["task"] == "passkey"
    ]
    return f"{sum(found)} of {len(found)}"


def loss(results: dict[str, Any], method: str, begin: int, key: str | None = None) -> Any:
    (cell,) = [cell for cell in results["summary"]["loss"] if (cell["method"], cell["begin"]) == (method, begin)]
    return cell[key] if key else f"{cell['value']:.3f}"


def test_the_real_models_keys() -> None:
    text, results = PAGE.read_text(encoding="utf-8"), kept("real_model_32768")
    for title, lengths in (
        ("pass keys found at 4,096 and 8,192 tokens", (4096, 8192)),
        ("at 12,288 and 16,384 tokens", (12288, 16384)),
        ("at 32,768 tokens", (32768,)),
    ):
        assert f"| {title} | {' | '.join(keys_found(results, method, *lengths) for method in METHODS)} |\n" in text


@pytest.mark.parametrize("page", [FRONT, PAGE], ids=lambda page: page.name)
def test_the_real_models_losses(page: Path) -> None:
    text, results = page.read_text(encoding="utf-8"), kept("real_model_32768")
    for title, begin in (("first 8,192 of 16,384 tokens", 0), ("the rest", 8192)):
        unmodified, yarn, ours = (loss(results, method, begin) for method in METHODS)
        assert f"| loss per token, {title} | {unmodified} | {yarn} | **{ours}** |\n" in text


def test_rulers_tables() -> None:
    rows: list[Row] = kept("real_model_ruler")["answers"]
    page, front = (path.read_text(encoding="utf-8") for path in (PAGE, FRONT))
    lengths = (4096, 8192, 12288, 16384, 32768)

    def cells(tasks: Sequence[str], length: int) -> str:
        scores = (ruler_score(rows, method, tasks, length) for method in METHODS)
        return " | ".join(percent(score) if score else "-" for score in scores)

    for name, tasks in (("`niah_single_1`", RULER_DONE[:1]), ("`ruler_fwe`", RULER_DONE[1:]), ("mean", RULER_DONE)):
        listed = [f"| {length:,} | {cells(tasks, length)} |\n" for length in lengths]
        assert f"| {name} " + "| ".join(listed) in page
    listed = []
    for length in lengths[2:]:
        shares = (share_kept(rows, method, RULER_DONE, length, trained_length=8192) for method in METHODS)
        listed.append(f"| {length:,} | {' | '.join('-' if one is None else f'{one:.0%}' for one in shares)} |\n")
    assert "| kept of 8,192 " + "| ".join(listed) in page
    for length in lengths:
        title = "RULER at" if length == 4096 else "at"
        assert f"| {title} {length:,} tokens | {cells(RULER_DONE, length)} |\n" in front
    means = [score for m in METHODS for n in lengths if (score := ruler_score(rows, m, RULER_DONE, n))]
    widest = max(mean.high - mean.low for mean in means) / 2
    assert f"the widest interval of a mean is ±{100 * widest:.1f} points" in sentences(PAGE)
    both = [{row["name"]: row for row in rows if row["method"] == method} for method in ("unmodified", "self-extend")]
    within = [(one, both[1][name]) for name, one in both[0].items() if name in both[1] and one["length"] <= 8192]
    answers, scores = (sum(one[key] == other[key] for one, other in within) for key in ("answer", "score"))
    assert f"{answers} of {len(within)} answers of Self-Extend are the unmodified model's to the letter" in sentences(
        PAGE
    )
    assert f"and {scores} of {len(within)} scores the same" in sentences(PAGE)
    for task in set(RULER_TASKS) - set(RULER_DONE):
        score = ruler_score(rows, "unmodified", [task], 4096)
        assert score
        assert f"`{task}` {percent(score)}" in sentences(PAGE)


def test_the_long_servers_tables() -> None:
    text, short, long = PAGE.read_text(encoding="utf-8"), kept("real_model_32768"), kept("real_model_65536")
    unmodified = loss(short, "unmodified", 0)
    within, past = ([loss(long, method, begin) for method in METHODS[1:]] for begin in (0, 8192))
    assert f"| loss per token, first 8,192 of 16,384 tokens | {unmodified} | {within[0]} | **{within[1]}** |\n" in text
    assert f"| loss per token, the rest | - | {past[0]} | **{past[1]}** |\n" in text
    found = [keys_found(long, method, 12288) for method in METHODS[1:]]
    assert f"| pass keys found at 12,288 tokens | - | {found[0]} | {found[1]} |\n" in text
    for title, results in (("32,768 tokens (YaRN's factor 4)", short), ("65,536 tokens (factor 8)", long)):
        above = [loss(results, "yarn", begin, "above_self_extend") for begin in (0, 8192)]
        cells = " | ".join("{value:.3f} ({low:.3f} to {high:.3f})".format(**cell) for cell in above)
        assert f"| on the server of {title} | {cells} |\n" in text


def test_how_far_yarn_is_behind() -> None:
    text, results = sentences(FRONT), [kept("real_model_32768"), kept("real_model_65536")]
    short, long = ([loss(one, "yarn", begin, "above_self_extend") for one in results] for begin in (0, 8192))
    interval = "({low:.2f} to {high:.2f})"
    assert (
        "by {value:.2f} within the trained length on that server (95 %: {low:.2f} to {high:.2f})".format(**short[0])
        in text
    )
    assert ("by {value:.2f} " + interval + " on one sized for 65,536").format(**short[1]) in text
    assert f"ahead past it too, by {long[0]['value']:.2f} and {long[1]['value']:.2f}." in text


def test_what_three_keys_say() -> None:
    all_of_three, two_of_three = share(3, 3), share(2, 3)
    assert (
        f"(3 of 3 has a 95 % interval of {100 * all_of_three.low:.0f} to {100 * all_of_three.high:.0f} %, "
        f"2 of 3 of {100 * two_of_three.low:.0f} to {100 * two_of_three.high:.0f} %)"
    ) in sentences(PAGE)


def test_the_front_pages_speeds() -> None:
    """With several query heads a KV head, as nearly every model has them; `docs/speed.md` has the others."""
    speedups: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for row in lines("cpu_avx512_attention.jsonl"):
        grouped, ours = row["num_heads"] > row["num_kv_heads"], row["version"] != "0.2.0"
        if grouped and ours and row["phase"] != "store" and row["dtype"] in speedups:
            speedups[row["dtype"]].append(row["speedup"])
    full, half = (f"{min(found):.1f} to {max(found):.1f} times" for found in speedups.values())
    assert f"with grouped heads {full} as fast as vLLM's own attention in float32, {half} in bfloat16" in sentences(
        FRONT
    )


def test_the_orders_table() -> None:
    text, results = PAGE.read_text(encoding="utf-8"), kept("order_curve")
    cells = results["grouped"]["summary"]
    settings = '{{"exact_short": false, "group_size": {}, "neighbor_window": 32}}'
    methods = {"none": "self-extend", **{n: f"self-extend {settings.format(n)}" for n in (4, 16, 64)}}
    shares = {(c["method"], c["distance"], c["gap"]): Estimate(c["value"], c["low"], c["high"]) for c in cells}
    for group_size, method in methods.items():
        row = (" / ".join(percent(shares[method, distance, gap]) for gap in (0, 64)) for distance in (16, 64, 128))
        assert f"| {group_size} | {' | '.join(row)} |\n" in text
    text, asked = sentences(PAGE), results["grouped"]["settings"]["prompts"]["order"]["count"] // 6
    assert f"; {asked} questions a cell" in text
    beside = {name: [shares[method, distance, 0].value for distance in (64, 128)] for name, method in methods.items()}
    ungrouped, grouped = beside.pop("none"), [value for values in beside.values() for value in values]
    assert set(ungrouped) == {1.0}
    right = f"{asked * sum(grouped):.0f} of {asked * len(grouped)} were told right, where without groups all were"
    assert right in text
    assert all(shares[method, distance, 64].value == 1.0 for method in methods.values() for distance in (64, 128))
    rate = f"{100 * sum(grouped) / len(grouped):.0f} % of the time"
    assert f"still does where 64 tokens lie between them, and {rate} where none do." in sentences(FRONT)
    near = [cell for cell in cells if cell["gap"] == 0 and cell["distance"] > 32]
    margins = [fmean(c["margin"]["value"] for c in near if c["method"] == method) for method in methods.values()]
    assert "by {:.1f} without groups, by {:.1f}, {:.1f} and {:.1f} with groups of 4, 16 and 64".format(*margins) in text
    longer = results["longer"]
    largest = max(longer["settings"]["plan"]["group_sizes"].values())
    least = min(cell["value"] for cell in longer["summary"])
    assert f"texts up to 4,096 tokens, group sizes up to {largest:.0f}, no cell was below {100 * least:.0f} %." in text


def test_the_demos_table() -> None:
    text, rows = PAGE.read_text(encoding="utf-8"), kept("demo")["answers"]
    for length in (256, 512, 1024, 2048, 4096):
        cells = [
            " / ".join(
                percent(share)
                for count in (1, 4)
                if (share := task_share(rows, "passkey", method, length=length, num_keys=count))
            )
            for method in ("unmodified", "self-extend")
        ]
        assert f"| {length:,} | {' | '.join(cells)} |\n" in text


def test_every_architecture_is_proved_or_refused_in_both_hosts() -> None:
    """Or cannot be run there without us; what is refused says why. None crashes, none differs."""
    rows = lines("model_proof.jsonl")
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    for row in rows:
        applied, name = row["applied"], row["name"]
        assert row["status"] in ("proved", "close", "refused", "not runnable"), name
        assert applied["status"] in ("proved", "refused", "not runnable"), name
        assert all(one["reason"] for one in (row, applied) if one["status"] != "proved"), name
        title = f"{name}, {row['variant']}" if row["variant"] else name
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {title} |")]
        in_vllm, in_transformers = line.strip("| ").split(" | ")[2:]
        assert in_vllm.strip("*").startswith(row["status"]), name
        assert in_transformers.strip("*").startswith(applied["status"]), name
    proved = {row["name"] for row in rows if row["status"] == "proved"}
    assert f"[{len(proved)} architectures proved token for token]" in sentences(FRONT)


def test_what_a_gpu_should_take() -> None:
    assert gpu_prediction.tables() in (ROOT / "docs" / "gpus.md").read_text(encoding="utf-8")


def test_the_hour_under_load() -> None:
    text, soak = sentences(PAGE), kept("soak")
    answered = soak["answer"] + soak["stream"] + soak["broken off"]
    assert (soak["wrong"], soak["lost"], soak["not refused"]) == (0, 0, 0)
    for number in (soak["clients"], answered, soak["stream"], soak["broken off"], soak["bad"], soak["preemptions"]):
        assert f"{number:,}" in text
    assert f"an hour under load of 0.2.0, with none of {answered:,} answers wrong" in sentences(FRONT)
    grown = {name.split()[0]: sizes for name, sizes in soak["megabytes"].items()}
    core, worker, server = (grown[name] for name in ("VLLM::EngineCore", "VLLM::Worker", "vllm"))
    assert f"the engine core's memory grew by {core[1] / core[0] - 1:.1%}".replace("%", " %") in text
    assert f"the worker's from {worker[0]:.0f} to {worker[1]:.0f} MB" in text
    assert f"from {server[0]:.0f} to {server[1]:.0f} MB (without the plugin too" in text
