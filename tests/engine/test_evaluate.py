"""`evaluate` on the demo's model, as a user runs it: whole, and broken off and started again."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoTokenizer

from tests.support.oracle import SelfExtend
from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.evaluation.engine import ask
from vllm_selfextend.evaluation.order import CITIES, OrderTask
from vllm_selfextend.evaluation.passkey import COMPLETED
from vllm_selfextend.evaluation.summary import block_losses

METHODS = ("unmodified", "self-extend")
PASSKEYS, TEXTS = 2 * 3, 2


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two texts of words that the model knows."""
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / "forward.txt", folder / "backward.txt"]
    for path, filler in zip(paths, (COMPLETED.filler, COMPLETED.filler[::-1]), strict=True):
        path.write_text(" ".join(filler * 200))
    return paths


def command(texts: list[Path], output: Path) -> list[str]:
    options = ["--max-model-len", "1024", "--length", "512", "--length", "1024", "--depths", "3", "--no-chat"]
    options += [f"--method={method}" for method in METHODS] + [f"--text={path}" for path in texts]
    options += ["--engine-args", '{"dtype": "float32", "max_num_batched_tokens": 512}', "--output", str(output)]
    # As in a terminal: these tests may run in a shell's background, where Ctrl-C is ignored.
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    script += "from vllm_selfextend.__main__ import main; main()"
    return [sys.executable, "-c", script, "evaluate", str(MODEL_DIR), *options]


def environment() -> dict[str, str]:
    """As in a user's shell: the tests' own settings silence vLLM."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OMP_"))}


@pytest.fixture(scope="module")
def whole(texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that nobody broke off, and its output."""
    output = tmp_path_factory.mktemp("whole")
    done = subprocess.run(command(texts, output), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout


def test_what_is_found_and_shown(whole: tuple[Path, str]) -> None:
    output, shown = whole
    results = json.loads((output / "results.json").read_text())
    answers = results["answers"]
    assert len(answers) == len(METHODS) * (PASSKEYS + TEXTS)
    shares = {(row["method"], row["length"]): row["value"] for row in results["summary"]["passkey"]}
    assert shares["self-extend", 1024] == 1.0
    assert shares["unmodified", 1024] < 1.0
    for text in ("Passkeys found, on a server of 1,024 tokens", "Loss per token", "256 to 1,024", "Wrote results.json"):
        assert text in " ".join(shown.split())
    for name in ("passkeys.png", "loss.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")


def test_losses_are_those_of_transformers(whole: tuple[Path, str], texts: list[Path], oracle: Callable) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    token_ids = [tokenizer(path.read_text())["input_ids"][:1023] for path in texts]
    results = json.loads((whole[0] / "results.json").read_text())
    plan = results["settings"]["plan"]
    extended = SelfExtend(plan["group_size"], plan["neighbor_window"], exact_len=256)
    means = {}
    for method, numbers in (("unmodified", SelfExtend(1, 1)), ("self-extend", extended)):
        wanted = []
        for ids, logprobs in zip(token_ids, oracle(str(MODEL_DIR), token_ids, numbers), strict=True):
            # The token at position p is foretold by row p - 1.
            losses = -logprobs[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
            wanted += [float(losses[max(0, begin - 1) : begin + 255].mean()) for begin in range(0, 1023, 256)]
        means[method] = block_losses(results["answers"], method, 0, 1024)
        assert means[method] == pytest.approx(wanted, abs=1e-4)
    assert means["self-extend"][::4] == pytest.approx(means["unmodified"][::4], abs=1e-4), "within the trained length"
    assert means["self-extend"][1::4] != pytest.approx(means["unmodified"][1::4], abs=1e-2)


def test_rulers_tasks_and_another_self_extend(tmp_path: Path) -> None:
    """The demo's model knows none of the words, and scores nothing; what is seen is that all is asked and kept."""
    variant = '{"group_size": 16, "log_scale": false}'
    options = ["--max-model-len", "2048", "--length", "2048", "--rounds", "2", "--method", "self-extend", "--no-chat"]
    options += ["--task", "niah_single_1", "--task", "ruler_vt", "--self-extend", variant]
    options += ["--engine-args", '{"dtype": "float32"}', "--output", str(tmp_path)]
    command = [sys.executable, "-m", "vllm_selfextend", "evaluate", str(MODEL_DIR), *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    names = ["self-extend", f"self-extend {variant}"]
    assert results["settings"]["methods"] == names
    asked = [(row["method"], row["task"], row["length"], row["round"]) for row in results["answers"]]
    tasks = "niah_single_1", "ruler_vt"
    assert asked == [(name, task, 2048, turn) for name in names for task in tasks for turn in range(2)]
    assert all(0 <= row["score"] <= 1 and len(row["answer"]) > 0 for row in results["answers"])
    summary = [(cell["task"], cell["method"]) for cell in results["summary"]["ruler"]]
    assert summary == [(task, name) for task in (*tasks, "mean") for name in names]
    shown = " ".join(done.stdout.split())
    for text in ("RULER: what was asked for and found", "niah_single_1", "Self-Extend, group_size 16, log_scale false"):
        assert text in shown
    assert (tmp_path / "ruler.png").read_bytes().startswith(b"\x89PNG")
    log = (tmp_path / "vllm.log").read_text()
    assert "group size by position, 20 at 2048 tokens" in log
    assert "group size 16, which reaches 3136 tokens" in log
    assert "nltk" not in log, "it looks for nothing in the network"
    # The bars, and nothing of the harness.
    assert {line.split()[0] for line in done.stderr.splitlines() if line} == {"Self-Extend", "Self-Extend,", "all"}


def test_the_order_tasks_margins_are_the_oracles(start_engine: Callable, oracle: Callable) -> None:
    def encode(text: str, answer_begins: str) -> list[int]:
        """Some token of the model's for each word, another for each city."""
        words = f"{text} {answer_begins}".split()
        return [3 + CITIES.index(word) if word in CITIES else 20 + len(word) for word in words]

    task = OrderTask((600,), distances=(40, 400), gaps=(0, 60))
    prompts = list(task.prompts(encode))
    llm = start_engine(MODEL_DIR, dtype="float32", max_model_len=600, attention_backend="CUSTOM")
    rows: dict[str, dict] = {}
    ask(llm, task, prompts, lambda prompt, row: rows.update({prompt.name: row}))
    wanted = oracle(str(MODEL_DIR), [prompt.token_ids for prompt in prompts], SelfExtend("auto", 64, exact_len=256))
    for prompt, logprobs in zip(prompts, wanted, strict=True):
        first, second = (float(logprobs[-1, token]) for token in prompt.choices)
        assert rows[prompt.name]["margin"] == pytest.approx(first - second, abs=1e-3)
        assert rows[prompt.name]["score"] == float(first > second)
    assert len({row["margin"] for row in rows.values()}) == len(rows) == 8


def broken_off(
    texts: list[Path], output: Path, when: Callable[[], bool], send: Callable[[int], None], exit_code: int
) -> str:
    """Start the command, send it a signal when asked to, and see it and its engine end; what it said, in one line."""
    run = subprocess.Popen(
        command(texts, output), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        while run.poll() is None and not when():
            time.sleep(0.02)
        send(run.pid)
        _, said = run.communicate(timeout=60)
        soon = time.monotonic() + 10
        while (left := left_of(run.pid)) and time.monotonic() < soon:  # multiprocessing's resource tracker is the last
            time.sleep(0.1)
        assert not left
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == exit_code, said
    assert "Traceback" not in said
    return " ".join(said.split())


def left_of(session: int) -> list[str]:
    """The command lines of a session's processes that run."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                left.append(" ".join(process.cmdline()))
    return left


def ctrl_c(pid: int) -> None:
    """Ctrl-C reaches every process of a terminal's job."""
    os.killpg(pid, signal.SIGINT)


def terminate(pid: int) -> None:
    """`kill`, and a batch system, reach one."""
    os.kill(pid, signal.SIGTERM)


def test_ctrl_c_while_an_engine_starts(texts: list[Path], tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"

    def starts() -> bool:
        return log.exists() and "Initializing a V1 LLM engine" in log.read_text()

    said = broken_off(texts, tmp_path, starts, ctrl_c, 130)
    assert said.endswith("Stopped.")
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_run_broken_off_goes_on(whole: tuple[Path, str], texts: list[Path], tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"

    def answered() -> bool:
        return answers.exists() and answers.read_text().count("\n") >= 2

    said = broken_off(texts, tmp_path, answered, terminate, 143)
    assert "Stopped. What was answered is in" in said
    first = answers.read_text().splitlines()
    assert 2 <= len(first) < len(METHODS) * (PASSKEYS + TEXTS)

    done = subprocess.run(command(texts, tmp_path), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert answers.read_text().splitlines()[: len(first)] == first
    assert len({(row["method"], row["name"]) for row in rows}) == len(rows) == len(METHODS) * (PASSKEYS + TEXTS)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads((whole[0] / "results.json").read_text())
