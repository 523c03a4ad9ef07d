import dataclasses
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import typer
import vllm.logger  # noqa: F401  (sets vLLM's log up here: not in a test, whose stdout is closed after it)
from typer.testing import CliRunner, Result
from vllm.engine.arg_utils import EngineArgs

import vllm_selfextend
from vllm_selfextend import cli
from vllm_selfextend.__main__ import main
from vllm_selfextend.demo import MODEL_DIR
from vllm_selfextend.demo import run as demo
from vllm_selfextend.evaluation.records import Records
from vllm_selfextend.evaluation.run_folder import RunFolder
from vllm_selfextend.evaluation.screen import Stopped, stopped_by_signals
from vllm_selfextend.vllm import plugin

from .full_disk import full_disk


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def plan(*arguments: object) -> dict:
    result = invoke("plan", *arguments, "--json")
    return json.loads(result.stdout)


def test_plan_of_the_demo_model() -> None:
    report = plan(MODEL_DIR, "--max-model-len", 4096)
    assert report["supported"] is True
    assert (report["trained_length"], report["neighbor_window"], report["group_size"]) == (256, 64, "auto")
    assert report["capacity"] is None
    # (i - 64) / 105 for i = 511, 1023, 2047 and 4095, rounded up to four bits.
    assert report["group_sizes"] == {"256": 1.0, "512": 4.5, "1024": 10.0, "2048": 20.0, "4096": 40.0}
    # 4 layers, keys and values, 2 heads of 32; vLLM serves float32 checkpoints in 16 bits.
    assert report["kv_bytes_per_token"] == 4 * 2 * 2 * 32 * 2
    assert report["kv_bytes_per_sequence"] == 4096 * report["kv_bytes_per_token"]


def test_plan_prints_a_table_and_the_command() -> None:
    result = invoke("plan", MODEL_DIR, "--max-model-len", 600)
    assert result.exit_code == 0
    shown = " ".join(result.stdout.replace("│", "").split())
    assert "trained length L 256 tokens" in shown
    assert "group size G auto by position: 1 at 256, 4.5 at 512, 5.5 at 600 tokens" in shown
    assert "longest sequence any, up to 134,217,728" in shown
    assert "--attention-backend CUSTOM --max-model-len 600" in shown
    assert "--additional-config" not in shown


def test_plan_with_the_users_numbers() -> None:
    numbers = ["--group-size", 8, "--neighbor-window", 64]
    report = plan(MODEL_DIR, "--max-model-len", 1600, *numbers)
    assert (report["group_size"], report["capacity"]) == (8, 1600)
    assert report["group_sizes"] == {"256": 1.0, "512": 8.0, "1024": 8.0, "1600": 8.0}
    shown = " ".join(invoke("plan", MODEL_DIR, "--max-model-len", 1600, *numbers).stdout.replace("│", "").split())
    assert "group size G 8: 1 at 256, 8 at 512," in shown
    assert "longest sequence 1,600 tokens" in shown
    assert """--additional-config '{"self_extend": {"group_size": 8, "neighbor_window": 64}}'""" in shown
    assert plan(MODEL_DIR, "--max-model-len", 4096, "--trained-length", 512)["trained_length"] == 512


def test_plan_within_the_trained_length() -> None:
    """Any window is allowed there."""
    for window in (64, 255, 256):
        report = plan(MODEL_DIR, "--max-model-len", 256, "--neighbor-window", window)
        assert (report["supported"], report["group_sizes"]) == (True, {"256": 1.0})
    result = invoke("plan", MODEL_DIR, "--max-model-len", 257, "--neighbor-window", 255)
    assert result.exit_code == 1
    assert "Set neighbor_window to at most 126, or group_size to a number" in " ".join(result.stderr.split())


def write_config(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    config = json.loads((MODEL_DIR / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_plan_prints_a_command_for_the_shell(tmp_path: Path) -> None:
    model = write_config(tmp_path / "it's mine")
    arguments = {"dtype": "float32", "enforce_eager": True, "hf_overrides": {"a b": 1}, "enable_prefix_caching": False}
    options = "--max-model-len", "4k", "--engine-args", json.dumps(arguments)
    result = invoke("plan", model, *options, "--neighbor-window", 48)
    command = shlex.split(result.stdout[result.stdout.index("vllm serve") :])
    assert command[:3] == ["vllm", "serve", str(model)]
    assert command[command.index("--max-model-len") + 1] == "4000"
    assert command[command.index("--dtype") + 1] == "float32"
    assert json.loads(command[command.index("--hf-overrides") + 1]) == {"a b": 1}
    assert {"--enforce-eager", "--no-enable-prefix-caching"} < set(command)
    assert json.loads(command[command.index("--additional-config") + 1])["self_extend"] == {"neighbor_window": 48}
    assert "--additional-config" not in invoke("plan", model, *options).stdout, "there is nothing to choose"


def test_plan_where_a_connectors_package_is_missing() -> None:
    connector = {"kv_transfer_config": {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both"}}
    result = invoke("plan", MODEL_DIR, "--max-model-len", 4096, "--engine-args", json.dumps(connector))
    assert result.exit_code == 1
    assert "no: No module named 'lmcache'" in " ".join(result.stdout.replace("│", "").split())


@pytest.mark.parametrize(("text", "tokens"), [("4k", 4000), ("4K", 4096), ("4096", 4096), ("1.5k", 1500)])
def test_lengths_as_vllm_reads_them(text: str, tokens: int) -> None:
    report = plan(MODEL_DIR, "--max-model-len", text, "--trained-length", "1K")
    assert (report["max_model_len"], report["trained_length"]) == (tokens, 1024)


@pytest.mark.parametrize("text", ["4x", "-1", "0", "0k", "1.5K", "auto", ""])
@pytest.mark.parametrize("command", ["plan", "evaluate", "tune"])
def test_lengths_that_are_none(command: str, text: str) -> None:
    result = invoke(command, MODEL_DIR, f"--max-model-len={text}")
    assert result.exit_code == 2
    assert "--max-model-len" in result.stderr
    assert "Traceback" not in result.stderr


def test_plan_says_how_it_takes_the_option_that_helps(tmp_path: Path) -> None:
    model = write_config(tmp_path, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64)
    result = invoke("plan", model, "--max-model-len", 4096)
    assert "Add --disable-sliding-window" in " ".join(result.stdout.replace("│", "").split())
    advice = """Here --disable-sliding-window is --engine-args '{"disable_sliding_window": true}'"""
    assert advice in result.stderr
    helped = plan(model, "--max-model-len", 4096, *shlex.split(advice)[-2:])
    assert (helped["supported"], helped["trained_length"]) == (True, 64)
    result = invoke("plan", model, "--max-model-len", 4096, "--engine-args", '{"max_model_len": 1}')
    assert "cannot set 'max_model_len'" in result.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_position_embeddings": "256"}, "cannot be read: .*'max_position_embeddings' expected int, got str"),
        ({"max_position_embeddings": 0}, "trained for 0 tokens. Set self_extend.trained_length to the true number"),
        ({"rope_parameters": {"rope_type": "linear"}}, "cannot be read: KeyError: Missing .*'factor'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "cannot be read: TypeError: can't multiply"),
    ],
)
def test_configs_that_are_not_what_they_should_be(changes: dict, said: str, tmp_path: Path) -> None:
    result = invoke("plan", write_config(tmp_path, **changes), "--max-model-len", 4096)
    assert result.exit_code == 1
    assert re.search(said, " ".join(result.stderr.split()))
    assert "Traceback" not in result.stderr


def test_plan_past_the_capacity() -> None:
    result = invoke("plan", MODEL_DIR, "--max-model-len", 4096, "--group-size", 8)
    assert result.exit_code == 1
    assert "Set group_size to 22 or more or leave it out" in " ".join(result.stderr.split())


def test_plan_of_an_unsupported_model(tmp_path: Path) -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = invoke("plan", tmp_path, "--max-model-len", 4096)
    assert result.exit_code == 1
    assert "dynamic NTK" in result.stdout
    report = plan(tmp_path, "--max-model-len", 4096)
    assert report["supported"] is False
    assert "dynamic NTK" in report["why_not"]


def test_plan_of_a_model_with_sliding_layers(tmp_path: Path) -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    config |= {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "sliding_window": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = plan(tmp_path, "--max-model-len", 4096)
    assert report["kv_bytes_per_token"] == 1024
    # Every other layer keeps its window and a step's 2,048 tokens only: 127 + 2,048, in blocks of 128 and one more.
    assert report["kv_bytes_per_sequence"] == 512 * 4096 + 512 * 18 * 128


def test_plan_of_nothing() -> None:
    result = invoke("plan", "no/such/model", "--max-model-len", 4096)
    assert result.exit_code == 1
    assert "no/such/model" in result.stderr


@pytest.mark.parametrize(
    ("plugins", "advice"), [("", "selfextend"), ("lora_resolver, other", "lora_resolver,other,selfextend")]
)
def test_vllm_plugins_that_keep_the_plugin_out(
    plugins: str, advice: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    commands = [[name, MODEL_DIR, "--max-model-len", 4096] for name in ("plan", "evaluate", "tune")]
    for command in [*commands, ["demo"]]:
        result = invoke(*command, *(["--output", tmp_path] if command[0] != "plan" else []))
        assert result.exit_code == 1
        said = f"VLLM_PLUGINS is {plugins!r}, which keeps Self-Extend out: vLLM loads no plugin that it does not name."
        assert f"{said} Set VLLM_PLUGINS={advice}, or unset it." in " ".join(result.stderr.split())
    monkeypatch.setenv("VLLM_PLUGINS", advice)
    assert invoke("plan", MODEL_DIR, "--max-model-len", 4096).exit_code == 0


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a clone on PYTHONPATH, or started in; vLLM would not find its plugin."""
    monkeypatch.setattr(plugin, "entry_points", lambda group: ())
    result = invoke("plan", MODEL_DIR, "--max-model-len", 4096)
    assert result.exit_code == 1
    said = "".join(result.stderr.split())
    where = f"not installed in {sys.prefix}, so that vLLM finds no plugin selfextend there; what runs is the folder "
    assert "".join(f"{where}{Path(vllm_selfextend.__file__).parent}. Install it.".split()) in said


@pytest.mark.parametrize(
    ("options", "exit_code", "said"),
    [
        (["no/such/model", "--max-model-len", 1024], 1, "no/such/model"),
        ([MODEL_DIR, "--max-model-len", 256], 1, "trained for 256 tokens, and 256 are within them"),
        ([MODEL_DIR, "--max-model-len", 0], 2, "--max-model-len"),
        ([MODEL_DIR, "--max-model-len", 1024, "--text", "no.txt"], 1, "The text no.txt cannot be read"),
        ([MODEL_DIR, "--max-model-len", 1024, "--engine-args", "dtype=float32"], 1, "is not JSON"),
        (
            [MODEL_DIR, "--max-model-len", 1024, "--engine-args", '{"max_model_len": 3}'],
            1,
            "cannot set 'max_model_len'",
        ),
        ([MODEL_DIR, "--max-model-len", 1024, "--engine-args", '{"dtpe": 3}'], 1, "no argument 'dtpe'"),
    ],
)
def test_evaluate_and_tune_refuse_in_a_sentence(options: list, exit_code: int, said: str, tmp_path: Path) -> None:
    for command in ("evaluate", "tune"):
        result = invoke(command, *options, "--output", tmp_path / command)
        assert result.exit_code == exit_code
        assert said in " ".join(result.stderr.split())
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "exit_code", "said"),
    [
        (["evaluate", "--method", "magic"], 2, "'magic' is not one of"),
        (["evaluate", "--task", "magic"], 2, "'magic' is not one of"),
        (["evaluate", "--group-size", 2], 1, "Set group_size to 6 or more or leave it out"),
        (["evaluate", "--length", 2048], 1, "--length 2048 is more than --max-model-len 1024"),
        (["evaluate", "--loss-length", 2048], 1, "--loss-length 2048 is more than --max-model-len 1024"),
        (["evaluate", "--task", "passkey", "--length", 64, "--keys", 6], 1, "too short: 6 key(s) take"),
        (["evaluate", "--task", "ruler", "--length", 1024], 1, "--length 1024 is too short for niah_single_1"),
        (["evaluate", "--self-extend", "{"], 1, "--self-extend '{' is not JSON"),
        (["evaluate", "--self-extend", "3"], 1, """'3' must be an object such as {"group_size": 8}."""),
        (["evaluate", "--self-extend", '{"group": 8}'], 1, "self_extend has no setting 'group'"),
        (["evaluate", "--loss-length", 2], 1, "A loss takes at least 3 tokens of a text, and 2 are to be read"),
        (["tune", "--task", "prompts"], 1, "--task prompts needs a file of them"),
        (["tune", "--prompts", "no.jsonl"], 1, "The prompts no.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_asked(options: list, exit_code: int, said: str, tmp_path: Path) -> None:
    result = invoke(options[0], MODEL_DIR, "--max-model-len", 1024, *options[1:], "--output", tmp_path)
    assert result.exit_code == exit_code
    assert said in " ".join(result.stderr.replace("│", "").split())


@pytest.fixture
def configs_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models whose config vLLM reads in this process; a plan's start-up has one of its own."""
    read = []
    create = EngineArgs.create_model_config

    def reading(arguments: EngineArgs) -> object:
        read.append(arguments.model)
        return create(arguments)

    monkeypatch.setattr(EngineArgs, "create_model_config", reading)
    return read


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["plan"], "trained length L"),
        (["evaluate", "--loss-length", 2], "at least 3 tokens"),
        (["tune", "--no-exact-short", "--prompts", "no.jsonl"], "The prompts no.jsonl cannot be read"),
    ],
)
def test_a_config_is_read_once(options: list, said: str, configs_read: list[str], tmp_path: Path) -> None:
    """By commands that come as far as to their prompts."""
    output = [] if options == ["plan"] else ["--output", tmp_path]
    result = invoke(options[0], MODEL_DIR, "--max-model-len", 1024, *options[1:], *output)
    assert said in result.stdout + result.stderr
    assert configs_read == [str(MODEL_DIR)]


def test_the_demo_reads_its_config_once(configs_read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "TASK", dataclasses.replace(demo.TASK, lengths=(512,), depths=(0.5,), rounds=1))
    comparison = demo.comparison()
    assert demo.example(comparison.prompts[0][1]).cell == {"length": 512, "num_keys": 4, "depth": 0.5, "round": 0}
    assert configs_read == [str(MODEL_DIR)]


def test_prompts_that_no_numbers_change_are_not_tuned(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "The sky is", "answer": "blue"}\n')
    result = invoke("tune", MODEL_DIR, "--max-model-len", 1024, "--prompts", prompts, "--output", tmp_path)
    assert result.exit_code == 1
    assert "tokens, within the trained length 256: no group size and no window" in result.stderr


def test_without_the_extra_the_commands_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else find_spec(name))
    result = invoke("evaluate", MODEL_DIR, "--max-model-len", 1024)
    assert result.exit_code == 1
    assert "needs scipy: pip install 'vllm-selfextend[eval]'" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "command",
    [["demo"], ["plan", "x", "--max-model-len", "1"], ["evaluate", "x", "--max-model-len", "1"]],
)
def test_without_vllm_the_commands_say_what_to_install(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = invoke(*command)
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "needs vLLM" in said
    assert "vllm-selfextend[cuda]" in said
    assert "vllm-selfextend[cpu]" in said


@pytest.mark.parametrize("missing", [["typer"], ["rich"], ["typer", "rich"]])
def test_the_command_without_what_it_is_made_of(missing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == (
        f"error: this command needs {' and '.join(missing)}: pip install 'vllm-selfextend[cli]'."
    )


def test_another_missing_package_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, cli.__name__)
    monkeypatch.delattr(vllm_selfextend, "cli")
    monkeypatch.setitem(sys.modules, "vllm_selfextend.method.plan", None)
    with pytest.raises(ModuleNotFoundError, match=r"vllm_selfextend\.method\.plan"):
        main()


def test_the_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"vllm-selfextend {vllm_selfextend.__version__}\n")


BRACKETS = "[red]a [b] :warning: c"
"""A name that rich would read as markup and an emoji."""


def test_names_are_printed_as_they_are(tmp_path: Path) -> None:
    model = tmp_path / BRACKETS
    model.mkdir()
    (model / "config.json").write_text((MODEL_DIR / "config.json").read_text())
    shown = invoke("plan", model, "--max-model-len", 4096).stdout
    assert "".join(shown.split()).count("".join(BRACKETS.split())) == 2, "in the title and in the command"


def test_a_terminal_without_the_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["vllm-selfextend", "--version"])
    with pytest.raises(SystemExit):
        main()
    cli._print_written(Path("caf\u00e9"), [Path("results.json")])
    sys.stdout.flush()
    assert shown.getvalue().endswith(b"\nWrote results.json and vllm.log to caf\\xe9.\n")


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of runs without --output."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def fail(error: BaseException, output: Path | None, *, answers: int = 0, model: str = "A") -> int:
    """A run that answers something and raises; its exit code."""

    def run(folder: RunFolder) -> None:
        folder.records = Records(folder.path, {"model": model})
        for name in range(answers):
            folder.records.add({"method": "yarn", "name": str(name)})
        raise error

    with pytest.raises(typer.Exit) as ended, cli._evaluating(output) as folder:
        run(folder)
    return ended.value.exit_code


@pytest.mark.parametrize("error", [ValueError("no [/b]"), OSError("no [/b]")])
def test_an_error_in_a_sentence_has_its_traceback_in_the_log(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / BRACKETS
    assert fail(error, output) == 1
    assert capsys.readouterr().err == f"error: no [/b]\nIts traceback is in {output}/vllm.log.\n"
    log = (output / "vllm.log").read_text()
    assert log.startswith("Traceback (most recent call last)")
    assert log.endswith(f"{type(error).__name__}: no [/b]\n")


def test_a_failed_run_says_how_it_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "my results"
    fail(OSError("no room"), output, answers=2)
    goes_on = f"What was answered is in {output}; the same command with --output '{output}' goes on.\n"
    assert capsys.readouterr().err.endswith(goes_on)
    with pytest.raises(RuntimeError, match="the engine died"):
        fail(RuntimeError("the engine died"), output)
    assert capsys.readouterr().err.endswith(goes_on)
    fail(OSError("no room"), output, model="B")
    said = capsys.readouterr().err
    assert "holds the answers of another run: there model was 'A', and now it is 'B'" in said
    assert "goes on" not in said


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_ended_by_a_signal(signum: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It raises, so that the engine is shut down, and is what comes out whatever else that brings."""
    handler = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(signum, handler)  # these tests may have been started by nohup
    engine = []

    def run() -> None:
        engine.append("runs")
        try:
            os.kill(os.getpid(), signum)
        except Stopped as stop:
            raise ValueError("the engine is dead") from stop
        finally:
            engine.clear()

    try:
        with pytest.raises(typer.Exit) as ended, cli._evaluating(tmp_path):
            run()
        assert signal.getsignal(signum) == handler
    finally:
        signal.signal(signum, before)
    assert not engine
    assert ended.value.exit_code == 128 + signum
    assert capsys.readouterr().err == "Stopped.\n"


def test_a_signal_that_somebody_ignores() -> None:
    """As nohup does for SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_without_output_leaves_what_is_of_use(temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with cli._evaluating(None) as folder:
        assert folder.path.parent == temporary
        Records(folder.path, {}).add({"method": "yarn", "name": "a"})
    assert not list(temporary.iterdir()), "it is on the screen"
    assert fail(Stopped(signal.SIGINT), None) == 130
    assert not list(temporary.iterdir()), "nothing was answered"
    capsys.readouterr()
    fail(ValueError("x"), None)
    (folder,) = temporary.iterdir()
    assert f"Its traceback is in {folder}/vllm.log." in capsys.readouterr().err
    assert "ValueError: x" in (folder / "vllm.log").read_text()


def test_a_run_without_output_that_was_stopped_goes_on(temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fail(Stopped(signal.SIGINT), None, answers=1)
    (folder,) = temporary.iterdir()
    assert f"is in {folder}; the same command with --output {folder} goes on" in capsys.readouterr().err
    with cli._evaluating(folder):
        assert list(Records(folder, {"model": "A"}).rows) == [("yarn", "0")]


def test_a_temporary_folder_that_cannot_be(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with full_disk():
        fail(ValueError("x"), None)
    assert "could not be written ([Errno 27] File too large) to" in capsys.readouterr().err
    assert not list(temporary.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises(typer.Exit), cli._evaluating(None):
        pass
    assert "error: Without --output a run needs a temporary folder, and there is none" in capsys.readouterr().err
