"""The scripts that measure others' tables again: what the machine with the weights would refuse is refused here."""

import importlib
import importlib.util
import pkgutil

import pytest

from benchmarks import published
from benchmarks.published.table import RULER, Published, missing_modules, shorter
from vllm_selfextend.evaluation.methods import METHODS
from vllm_selfextend.method.config import SelfExtendConfig
from vllm_selfextend.method.plan import CONFIG_KEY

SCRIPTS = [module.name for module in pkgutil.iter_modules(published.__path__)]
TABLES: dict[str, Published] = {
    name: importlib.import_module(f"benchmarks.published.{name}").TABLE
    for name in SCRIPTS
    if name not in ("table", "dry_run")
}


@pytest.mark.parametrize("dry", [False, True], ids=["measured", "dry run"])
@pytest.mark.parametrize("name", TABLES)
def test_a_table(name: str, dry: bool) -> None:
    table = shorter(TABLES[name]) if dry else TABLES[name]
    columns = [column.name for column in table.columns] + ["mean"] * table.has_mean
    assert len({line.name for line in table.lines}) == len(table.lines)
    assert len({*columns}) == len(columns)
    for line in table.lines:
        assert {*line.published} <= {*columns}
        assert line.method is None or line.method.name in METHODS
        if line.method is not None and line.method.settings is not None:
            settings = {CONFIG_KEY: {"trained_length": table.trained_length, **line.method.settings}}
            plan = SelfExtendConfig.from_additional_config(settings)
            plan.plan(table.config["max_position_embeddings"], table.max_model_len)
    assert sum(bool(line.published) for line in table.lines) >= 1
    for column in table.columns:
        assert column.length is None or column.length <= table.max_model_len


def test_they_ask_all_of_ruler() -> None:
    assert len({*RULER}) == 13
    assert TABLES["llama_2_7b"].columns[0].tasks == RULER


def test_what_is_not_installed_is_said_before_an_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing_modules(TABLES["phi_2"]) == ["lm_eval", "jieba", "fuzzywuzzy", "rouge"]
    assert missing_modules(TABLES["llama_2_7b"]) == ["lm_eval", "nltk", "wonderwords"]
