"""`docs/recipes`: vLLM takes every command, and every number is what `plan` says of the model as it is published.

Commands run where the configs of `tests/support/hub_configs.py` lie as on the hub, so that names need no network.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import multiprocessing
import re
import shlex
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from typer.testing import CliRunner
from vllm.config import CacheConfig
from vllm.config.parallel import DistributedExecutorBackend
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.support.hub_configs import CONFIGS, WEIGHTS, save_configs
from vllm_selfextend import PlanReport, cli, plan_report
from vllm_selfextend.backends.interface import Host
from vllm_selfextend.backends.triton.buffers import Room
from vllm_selfextend.backends.triton.layer import workspace_size
from vllm_selfextend.backends.triton.tiles import Device
from vllm_selfextend.method.plan import CONFIG_KEY
from vllm_selfextend.vllm.cache_size import make_model
from vllm_selfextend.vllm.kv_connectors import with_layout

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "recipes"
INDEX = FOLDER / "README.md"
PAGES = sorted(FOLDER.glob("*.md"))
RECIPES = [page for page in PAGES if page != INDEX]
GIB = 2**30
ELSEWHERE = ("tensor_parallel_size", "distributed_executor_backend", "kv_transfer_config")
"""Arguments that need GPUs or LMCache, and change no number of a plan."""
MULTIPROCESSORS = 132
"""Of an H100. A decode needs room that follows from it, less than a prefill in every row."""


@pytest.fixture(autouse=True, scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The working folder, in which the hub's names are paths."""
    folder = tmp_path_factory.mktemp("hub")
    save_configs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


class Command(NamedTuple):
    """What a command serves."""

    model: str
    max_model_len: int
    settings: dict[str, Any]
    engine_args: dict[str, Any]


class Block(NamedTuple):
    """The commands of a code block, and what `plan` prints, which is the block below it."""

    commands: list[list[str]]
    output: str


def read_commands(text: str) -> list[list[str]]:
    """Lines as a shell reads them, without what sets an environment variable for one."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    return [[*itertools.dropwhile(re.compile(r"[A-Z_]+=").match, line)] for line in lines if line]


def blocks(page: Path) -> Iterator[Block]:
    """The page's code blocks, but for those that are another one's output."""
    texts = iter(re.findall(r"^```\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S))
    for text in texts:
        commands = read_commands(text)
        output = next(texts) if commands[0][:2] == ["vllm-selfextend", "plan"] else ""
        yield Block(commands, output)


def commands_of(page: Path, *program: str) -> list[list[str]]:
    """The page's commands that begin with these words."""
    found = [words for block in blocks(page) for words in block.commands]
    return [words for words in found if words[: len(program)] == [*program]]


def prose(page: Path) -> str:
    """A page without its code blocks and tables, in one line."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return " ".join(" ".join(line for line in text.splitlines() if not line.startswith("|")).split())


def table(page: Path, first: str) -> list[dict[str, str]]:
    """The rows of the page's tables whose first column is called `first`."""
    rows, header = [], []
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells or not header:
            header = cells
        elif header[0] == first and not cells[0].startswith("---"):
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


@functools.cache
def serve_parser() -> argparse.ArgumentParser:
    return ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())


def parsed(words: list[str]) -> Command:
    """A `vllm serve ...` as vLLM takes it: what differs from its defaults.

    Raises:
        SystemExit: vLLM has no such option, or not that value of it.

    """
    assert words[2] in CONFIGS
    default, given = (EngineArgs.from_cli_args(serve_parser().parse_args(one)) for one in (words[2:3], words[2:]))
    executor = given.distributed_executor_backend
    assert executor in (None, *get_args(DistributedExecutorBackend)), f"vLLM would look for a class called {executor}"
    changed = {
        field.name: getattr(given, field.name)
        for field in dataclasses.fields(EngineArgs)
        if getattr(given, field.name) != getattr(default, field.name)
    }
    assert changed.pop("attention_backend", None) is not None, f"without Self-Extend: {shlex.join(words)}"
    settings = changed.pop("additional_config", {}).get(CONFIG_KEY, {})
    return Command(words[2], changed.pop("max_model_len"), settings, changed)


def serve_commands(page: Path) -> list[Command]:
    return [parsed(words) for words in commands_of(page, "vllm", "serve")]


@functools.cache
def _plan(model: str, max_model_len: int, settings: str, engine_args: str) -> PlanReport:
    return plan_report(model, max_model_len, json.loads(settings), json.loads(engine_args))


def plan(command: Command) -> PlanReport:
    engine_args = {name: value for name, value in command.engine_args.items() if name not in ELSEWHERE}
    report = _plan(command.model, command.max_model_len, json.dumps(command.settings), json.dumps(engine_args))
    assert report.supported, report.why_not
    return report


def _count(model: str) -> int:
    torch.set_num_threads(1)
    args = EngineArgs(model=model, attention_backend="CUSTOM", additional_config={CONFIG_KEY: {}})
    return sum(one.numel() * one.element_size() for one in make_model(args.create_engine_config()).parameters())


@functools.cache
def weights(model: str) -> int:
    """Bytes of vLLM's parameters; like `plan`'s model, this one is made in a process that ends with it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(_count, model).result()


class Gpu(NamedTuple):
    """A row of the index's table: what is counted for a GPU."""

    has: float
    kept_back: float
    step: int

    @property
    def taken(self) -> float:
        return self.has * CacheConfig.gpu_memory_utilization


def gpus() -> dict[str, Gpu]:
    def number(cell: str) -> float:
        return float(re.findall(r"[\d.]+", cell.replace(",", ""))[0])

    rows = table(INDEX, "a GPU of")
    found = {
        row["a GPU of"]: Gpu(number(row["has"]), number(row["is kept back"]), int(number(row["tokens in a step"])))
        for row in rows
    }
    for row in rows:
        assert row["vLLM takes"] == f"{found[row['a GPU of']].taken:.1f} GiB"
    return found


def prefill_buffers(model: str, max_model_len: int, step: int, num_gpus: int) -> int:
    """Bytes that the plugin's prefills keep on each GPU."""
    config = CONFIGS[model]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    assert heads % num_gpus == kv_heads % num_gpus == 0, "vLLM would keep a KV head on several GPUs"
    head_size = config.get("head_dim", config["hidden_size"] // heads)
    room = Room.of(Host(step, max_model_len))
    shape = heads // num_gpus, kv_heads // num_gpus, head_size
    return workspace_size(*shape, torch.bfloat16, Device(None, MULTIPROCESSORS), room)


def gpus_of(row: dict[str, str]) -> tuple[int, str]:
    """How many GPUs of which kind a row of a page's table is about."""
    number, gpu = re.fullmatch(r"(?:(\d+) of )?(\d+ GB|a CPU)", row["on"]).groups()
    return int(number or 1), gpu


def row_of(row: dict[str, str], commands: list[Command]) -> tuple[Command, dict[str, str]]:
    """What a row of a page's table is about, and what has to stand in it."""
    num_gpus, gpu = gpus_of(row)
    model, length = re.fullmatch(r"`(.+)`, ([\d,]+)", row["served"]).groups()
    engine_args: dict[str, Any] = {"16 bits": {}, "fp8": {"kv_cache_dtype": "fp8"}}[row["cache"]]
    steps = {one.engine_args.get("max_num_batched_tokens") for one in commands}
    assert len(steps) == 1, "a page has steps of one length"
    if step := next(iter(steps)):
        engine_args = engine_args | {"max_num_batched_tokens": step}
    about = Command(model, int(length.replace(",", "")), {}, engine_args)
    report = plan(about)
    if gpu == "a CPU":
        buffers = None
        (left,) = {one.engine_args["kv_cache_memory_bytes"] for one in commands}  # of all of the page
    else:
        counted = gpus()[gpu]
        buffers = prefill_buffers(model, about.max_model_len, step or counted.step, num_gpus)
        left = (counted.taken - counted.kept_back) * GIB - weights(model) / num_gpus
    a_sequence = report.kv_bytes_per_sequence / num_gpus
    return about, {
        "served": row["served"],
        "cache": row["cache"],
        "on": row["on"],
        "weights": f"{weights(model) / num_gpus / GIB:.2f} GiB",
        "prefill buffers": "none" if buffers is None else f"{buffers / GIB:.2f} GiB",
        "a token": f"{report.kv_bytes_per_token / num_gpus:,.0f} bytes",
        "a sequence": f"{a_sequence / GIB:.2f} GiB",
        "room": f"{left / GIB:.2f} GiB",
        "at once": str(int(left // a_sequence) or "none"),
    }


@pytest.mark.parametrize("model", CONFIGS)
def test_the_configs_are_those_of_the_published_models(model: str) -> None:
    assert weights(model) == WEIGHTS.get(model, weights(model))


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_the_memory_counted(page: Path) -> None:
    commands, rows = serve_commands(page), table(page, "served")
    assert commands
    fits = set()
    for row in rows:
        about, expected = row_of(row, commands)
        assert row | {"at once": row["at once"].partition(",")[0]} == expected
        if expected["at once"] != "none":
            fits.add((about.model, about.max_model_len, row["cache"], gpus_of(row)[0]))
    for command in commands:
        cache, num_gpus = (
            command.engine_args.get(name, default)
            for name, default in (("kv_cache_dtype", "16 bits"), ("tensor_parallel_size", 1))
        )
        about = command.model, command.max_model_len, cache, num_gpus
        assert about in fits, f"{command} has no row in which it fits"


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_what_plan_prints(page: Path) -> None:
    def words(text: str) -> list[str]:
        return re.findall(r"[^\s│┌┐└┘├┤┬┴┼─\\]+", text)

    planned = [block for block in blocks(page) if block.output]
    assert planned
    for block in planned:
        (command,) = block.commands
        result = CliRunner().invoke(cli.app, command[1:])
        assert words(block.output) == words(result.stdout)
        (printed,) = (one for one in read_commands(block.output) if one[:2] == ["vllm", "serve"])
        served = [one._replace(engine_args={}) for one in serve_commands(page)]
        assert parsed(printed)._replace(engine_args={}) in served, "it plans what the page serves"


@pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)
def test_numbers_in_sentences(page: Path) -> None:
    text, commands = prose(page), serve_commands(page)
    reports = [plan(command) for command in commands]
    sizes = {f"{size:g} at {length:,}" for report in reports for length, size in report.group_sizes.items()}
    said = re.findall(r"group size is ([\d.]+ at [\d,]+)(?: tokens)?(?: and ([\d.]+ at [\d,]+))?", text)
    assert said, "what to expect"
    assert {one.rstrip(",") for both in said for one in both if one} <= sizes
    known = {cell for row in table(page, "served") + table(INDEX, "a GPU of") for cell in row.values()}
    if "in blocks of 16, a GPU's" in text:
        on_gpu = [plan(one._replace(engine_args=one.engine_args | {"block_size": 16})) for one in commands]
        known |= {f"{report.kv_bytes_per_sequence / GIB:.2f} GiB" for report in on_gpu}
    assert {*re.findall(r"[\d.]+ GiB", text)} <= known | {f"{size} GiB" for size in lmcache_sizes(page)}


def lmcache_sizes(page: Path) -> list[int]:
    """GiB that the page gives LMCache."""
    return [int(words[words.index("--l1-size-gb") + 1]) for words in commands_of(page, "lmcache", "server")]


def test_what_lmcache_holds_and_under_which_name() -> None:
    page = FOLDER / "lmcache.md"
    (size,) = lmcache_sizes(page)
    first, *others = serve_commands(page)
    report = plan(first)
    held = size * GIB // report.kv_bytes_per_sequence
    assert f"{size} GiB of LMCache's hold {held} sequences of {first.max_model_len:,} tokens" in prose(page)
    names = set()
    for command in (first, *others):
        assert command.engine_args["kv_transfer_config"].kv_connector == "LMCacheMPConnector"
        settings = {CONFIG_KEY: {"kernel": "triton"}}  # a GPU's
        arguments = {"max_model_len": command.max_model_len, "additional_config": settings}
        args = EngineArgs(model=command.model, attention_backend="CUSTOM", **arguments)
        names.add(with_layout(args.create_engine_config()).model_config.model)
    (name,) = names
    assert commands_of(page, f"cache_model_name={name}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_of_the_examples(page: Path) -> None:
    for words in commands_of(page, "python"):
        script = (ROOT / words[1]).read_text(encoding="utf-8")
        for option in (word for word in words if word.startswith("--")):
            assert f'"{option}"' in script, f"{words[1]} has no {option}"


def test_the_index() -> None:
    rows = {}
    for row in table(INDEX, "recipe"):
        target = re.search(r"\]\((\w+\.md)\)", row["recipe"])[1]
        rows[FOLDER / target] = row
    assert [*rows] == [*dict.fromkeys(rows)]
    assert {*rows} == {*RECIPES}
    for page, row in rows.items():
        reports = {(one.model, f"{one.max_model_len:,}"): plan(one) for one in serve_commands(page)}
        report = reports[row["model"].strip("`"), row["served"]]
        assert row["trained on"] == f"{report.trained_length:,}"
