"""The commands: what they print, and errors in one line."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
import transformers
import yaml
from peft import get_peft_model
from PIL import Image
from safetensors import safe_open
from typer.testing import CliRunner

from chorus_moe import (
    ChorusForConditionalGeneration,
    ChorusForContrastive,
    ChorusForSequenceClassification,
    ChorusProcessor,
)
from chorus_moe.training import cli
from chorus_moe.training import train as training
from chorus_moe.training.lora import lora_config
from tests.conftest import tiny_config
from tests.fresh_process import run_fresh
from tests.training.test_data import PLAIN, SOUND, write_jsonl
from tests.training.test_train import recipe  # noqa: F401  a fixture

COMMANDS = {
    "train",
    "recipes",
    "evaluate",
    "generate",
    "routing",
    "inspect",
    "doctor",
    "compose",
    "export",
    "demo",
    "serve",
    "chat",
    "page",
}


def invoke(*words: object) -> str:
    result = CliRunner().invoke(cli.app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def as_program(words: list[str], check: str) -> str:
    """Code that runs the program, then `check`."""
    start = f"import sys; sys.argv = {['chorus-moe', *words]!r}; from chorus_moe.serving.commands import app"
    return f"{start}; app(standalone_mode=False); {check}"


def last_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


@pytest.fixture
def folder(model: ChorusForConditionalGeneration, processor: ChorusProcessor, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_program_lists_its_commands() -> None:
    program = Path(sys.executable).with_name("chorus-moe")
    done = subprocess.run([program, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["inspect", "--help"]])
def test_help_imports_neither_torch_nor_transformers(words: list[str]) -> None:
    code = as_program(words, "print({'torch', 'transformers'} & sys.modules.keys())")
    assert last_line(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)) == "set()"


def test_the_program_has_every_public_name_and_refuses_others(tmp_path: Path) -> None:
    missing = "import chorus_moe; print([n for n in chorus_moe.__all__ if not hasattr(chorus_moe, n)], end=' ')"
    unknown = "print(hasattr(chorus_moe, 'ChorusModl'), hasattr(chorus_moe, '__wrapped__'))"
    code = as_program(["--help"], f"{missing}; {unknown}")
    assert last_line(run_fresh(code, cwd=tmp_path, environment=os.environ)) == "[] False False"


def test_a_command_of_the_program_knows_the_auto_classes(folder: Path) -> None:
    words = ["generate", "--model", str(folder), "--text", "what is it?", "--max-new-tokens", "2"]
    check = "from transformers import AutoConfig; print(AutoConfig.for_model('chorus').model_type)"
    assert last_line(run_fresh(as_program(words, check), cwd=folder, environment=os.environ)) == "chorus"


def error_of(monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    """The one line that the program ends with."""
    monkeypatch.setattr(sys, "argv", ["chorus-moe", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    return stop.value.code


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, folder / "pytorch_model.bin")


# What is wrong with the folder of a model -> the error of a command that loads it.
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "activation": (lambda f: change_config(f, hidden_act="silou"), "hidden_act 'silou'; did you mean 'silu'"),
    "rope": (
        lambda f: change_config(f, rope_parameters={"rope_type": "yarm"}),
        "rope_type 'yarm'; did you mean 'yarn'",
    ),
    "rope without a factor": (
        lambda f: change_config(f, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        "ChorusTextConfig: Missing required keys in `rope_parameters` for 'rope_type'='yarn': {'factor'}",
    ),
    "type": (lambda f: change_config(f, hidden_size="big"), "Field 'hidden_size' expected int, got str"),
    "size": (lambda f: change_config(f, num_hidden_layers=-1), "num_hidden_layers=-1 is outside 0..4096"),
    "bank": (
        lambda f: change_config(f, expert_banks={"items": {}}),
        "expert bank 'items': torch or PEFT uses this name",
    ),
    "weights": (lambda f: (f / "model.safetensors").write_bytes(b"cut"), "a .safetensors file is damaged or cut short"),
    "pickle": (pickled, "no file named model.safetensors"),
    "template": (
        lambda f: (f / "chat_template.jinja").write_text("{% for x in messages %}{{ x."),
        "TemplateSyntaxError: the chat template is wrong",
    ),
    "template asks": (
        lambda f: (f / "chat_template.jinja").write_text("{{ messages.a.b }}"),
        "UndefinedError: the chat template asks for what the conversation lacks",
    ),
    "template refuses": (
        lambda f: (f / "chat_template.jinja").write_text("{{ raise_exception('no system turns') }}"),
        "TemplateError: the chat template refuses the conversation: no system turns",
    ),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "the files of its tokenizer lack 'added_tokens'"),
    "configuration": (lambda f: (f / "config.json").write_text("{"), "is not a valid JSON file"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_one_line(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = BROKEN[case]
    change(folder)
    assert message in error_of(monkeypatch, "generate", "--model", folder, "--text", "what is it?")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--learning_rate", "fast"), "argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        (("--train_sampling_strategy", "group_by_length"), "no length before the collator makes tokens of them"),
        (("--train_sampling_strategy", "batch_rebalance"), "train_sampling_strategy='batch_rebalance': a row is text"),
        (("--optim", "adamw_torhc"), "optim='adamw_torhc' is no optimizer; did you mean 'adamw_torch'?"),
        (("--report_to", "nonsense"), "nonsense is not supported, only"),
        (("--train_data", "cut.jsonl"), "cut.jsonl: no readable .jsonl file: JSON parse error"),
        (("--train_data", "cut.parquet"), "cut.parquet: no readable .parquet file: Parquet magic bytes"),
    ],
)
def test_a_recipe_that_asks_for_what_is_not_there_is_one_line(
    words: tuple[str, str],
    message: str,
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cut.jsonl", "cut.parquet"):
        Path(name).write_text('{"messages": [')
    assert message in error_of(monkeypatch, "train", recipe, "--output_dir", tmp_path / "new", *words)


def test_a_tracker_that_is_not_installed_is_one_line_before_any_work(
    recipe: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transformers.integrations.integration_utils, "is_wandb_available", lambda: False)
    monkeypatch.setattr(training, "training_rows", None)
    message = error_of(monkeypatch, "train", recipe, "--report_to", "wandb")
    assert "WandbCallback requires wandb to be installed. Run `pip install wandb`" in message


@pytest.mark.parametrize(
    ("command", "source"),
    [
        *(("inspect", name) for name in ("modle", "tests/modle", "a/b/c", "./modle", "model.json")),
        *(
            (command, "modle")
            for command in ("generate", "doctor", "export", "evaluate", "routing", "compose", "train")
        ),
    ],
)
def test_a_mistyped_folder_is_no_name_on_the_hub(
    command: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    data = write_jsonl(tmp_path / "test.jsonl", [{"messages": PLAIN}])
    words = {
        "generate": ("--model", source, "--text", "hi"),
        "inspect": (source,),
        "doctor": (source,),
        "export": (source, tmp_path / "out"),
        "evaluate": ("--model", source, "--data", data),
        "routing": ("--model", source, "--data", data, "--out", tmp_path / "out"),
        "compose": ("--text", source, "--out", tmp_path / "out"),
        "train": ("--model_name_or_path", source, "--train_data", data, "--output_dir", tmp_path / "out"),
    }
    monkeypatch.setattr(socket.socket, "connect", None)
    assert "no such folder" in error_of(monkeypatch, command, *words[command])


def test_an_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("chorus_moe.training.inspect_model.inspect_model", fail)
    monkeypatch.setattr(sys, "argv", ["chorus-moe", "inspect", "x"])
    with pytest.raises(KeyError, match="ours"):
        cli.main()


def test_the_commands_say_where_the_model_is_and_in_what_numbers(folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", [{"messages": PLAIN}])
    choice = ["--device", "cpu", "--dtype", "bfloat16"]
    for words in (
        ["generate", "--model", folder, "--text", "what is it?", "--max-new-tokens", 1],
        ["evaluate", "--model", folder, "--data", data, "--max-new-tokens", 1, "--json"],
        ["routing", "--model", folder, "--data", data, "--out", tmp_path / "routing"],
        ["doctor", folder, "--check", "tensors"],
        ["export", folder, tmp_path / "export"],
    ):
        result = CliRunner().invoke(cli.app, [str(word) for word in [*words, *choice]], catch_exceptions=False)
        assert f"{folder}: on cpu, in bfloat16\n" in result.stderr, words
        assert "bfloat16" not in result.stdout, words
    with safe_open(tmp_path / "export" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} <= {torch.bfloat16, torch.int64}  # noqa: SIM118


def test_a_run_says_where_it_trains_and_in_what_numbers(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    first = tmp_path / "first"
    for number, (source, choice, said) in enumerate(
        [
            ("a new model", ["--dtype", "bfloat16"], torch.bfloat16),
            (str(first), [], torch.bfloat16),
            (str(first), ["--dtype", "float32"], torch.float32),
        ]
    ):
        out = tmp_path / "second" if number else first
        words = ["train", str(recipe), "--max_steps", "1", "--output_dir", str(out), *choice]
        if number:
            values = yaml.safe_load(recipe.read_text())
            recipe.write_text(yaml.safe_dump({**values, "model": {"model_name_or_path": str(first)}}))
            words += ["--overwrite_output_dir", "true"]
        result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
        assert f"{source}: on cpu, in {str(said).removeprefix('torch.')}\n" in result.stderr
        with safe_open(out / "model.safetensors", framework="pt") as file:
            assert file.get_tensor("lm_head.weight").dtype == said


def test_a_run_names_what_it_has_in_place_of_a_device(
    recipe: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "--use_cpu true" in error_of(monkeypatch, "train", recipe, "--device", "cpu")
    assert "dtype" in error_of(monkeypatch, "train", recipe, "--dtype", "int8")
    values = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**values, "training": {**values["training"], "device": "cpu"}}))
    assert "--use_cpu true" in error_of(monkeypatch, "train", recipe)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compose", "--text", "x", "--device", "cpu"], "--device cpu: compose copies weights on the CPU"),
        (["compress", "x", "--out", "y", "--dtype", "float32"], "--dtype float32: steps keep the model's numbers"),
        (["federated", "withdraw", "x", "b", "--out", "y", "--device", "cpu"], "training.use_cpu, model.dtype"),
    ],
)
def test_a_command_without_the_option_says_what_to_use(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message in error_of(monkeypatch, *words)


def test_the_demo_says_how_it_is_kept_from_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    from chorus_moe.training.demo.run import main

    with pytest.raises(SystemExit):
        main(["--device", "cpu"])
    assert "CUDA_VISIBLE_DEVICES= shows it none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (("--device", "gpu"), "unknown device 'gpu'; choose from ['cpu'"),
        (("--device", "meta"), "there is no device 'meta' here; choose from ['cpu'"),
        (("--device", "cuda:99"), "there is no device 'cuda:99' here; choose from ['cpu'"),
        (("--dtype", "int8"), "--dtype 'int8'; choose from auto, float32, bfloat16, float16"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "doctor"])
def test_a_device_or_dtype_that_is_not_there_is_refused(
    command: str, choice: tuple[str, str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"generate": ("--model", folder, "--text", "hi"), "doctor": (folder,)}
    assert message in error_of(monkeypatch, command, *words[command], *choice)


def test_inspect_prints_a_table_or_json(folder: Path, model: ChorusForConditionalGeneration) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{total:,}" in invoke("inspect", folder)
    assert json.loads(invoke("inspect", folder / "config.json", "--json"))["total"] == total


def test_evaluate_prints_accuracy_and_loss(folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", [{"messages": PLAIN}] * 2)
    values = json.loads(invoke("evaluate", "--model", folder, "--data", data, "--max-new-tokens", 2, "--json"))
    assert values["num_rows"] == 2
    assert values["loss"] > 0
    assert values["accuracy_by_medium"].keys() == {"text"}
    printed = invoke("evaluate", "--model", folder, "--data", data, "--max-new-tokens", 2)
    assert [line.rsplit(maxsplit=1)[0] for line in printed.splitlines()[-4:]] == [
        "accuracy", "loss", "num_rows", "accuracy text"
    ]  # fmt: skip


def test_evaluate_writes_every_answer_with_mistakes_first(folder: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", [{"messages": PLAIN, "task": "greet"}] * 2)
    out = tmp_path / "results"
    words = ["evaluate", "--model", folder, "--data", data, "--max-new-tokens", 2, "--out", out, "--json"]
    values = json.loads(invoke(*words))
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert [(row["row"], row["task"], row["medium"], row["question"]) for row in rows] == [
        (0, "greet", "text", "hi"), (1, "greet", "text", "hi")
    ]  # fmt: skip
    figures = json.loads((out / "results.json").read_text())
    assert figures == {"model": str(folder), "data": str(data), "split": "test"} | values
    assert "| greet | 2 |" in (out / "results.md").read_text()


def test_results_are_not_written_over_a_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", [{"messages": PLAIN}])
    message = error_of(monkeypatch, "evaluate", "--model", folder, "--data", data, "--out", data)
    assert "test.jsonl' is a file; give a folder" in message


def test_generate_answers_pictures_and_sound(folder: Path, tmp_path: Path) -> None:
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    soundfile.write(tmp_path / "a.wav", SOUND, 16_000)
    media = ["--image", tmp_path / "a.png", "--audio", tmp_path / "a.wav"]
    printed = invoke("generate", "--model", folder, "--text", "what is it?", *media, "--max-new-tokens", 3)
    assert printed.endswith("\n")


def test_export_writes_code_and_card(folder: Path, tmp_path: Path) -> None:
    invoke("export", folder, tmp_path / "export")
    assert {"modeling_generation.py", "README.md", "config.json"} <= {p.name for p in (tmp_path / "export").iterdir()}


@pytest.mark.parametrize(
    ("head", "is_adapter", "is_tied"),
    [(ChorusForContrastive, False, False), (ChorusForContrastive, False, True), (ChorusForContrastive, True, False),
     (ChorusForSequenceClassification, False, False)],
)  # fmt: skip
def test_export_keeps_the_head_that_was_saved(
    head: Any, is_adapter: bool, is_tied: bool, tmp_path: Path, processor: ChorusProcessor
) -> None:
    torch.manual_seed(0)
    vocab_size = len(processor.tokenizer)
    model = head(tiny_config(vocab_size=vocab_size, tie_word_embeddings=is_tied)).eval()
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    if is_adapter:
        model = get_peft_model(head.from_pretrained(tmp_path / "saved"), lora_config(model, dense=True, verbose=False))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_()
        model.save_pretrained(tmp_path / "adapter")
        model = model.merge_and_unload()
    invoke("export", tmp_path / ("adapter" if is_adapter else "saved"), tmp_path / "export")
    exported = head.from_pretrained(tmp_path / "export")
    assert exported.config.architectures == [head.__name__]
    assert exported.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(exported.state_dict()[name], value, rtol=0, atol=1e-6)  # sums of the merge


def test_train_takes_a_recipe_and_overrides(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    invoke("train", recipe, "--max_steps", "1", "--output_dir", tmp_path / "other")
    assert json.loads((tmp_path / "other" / "trainer_state.json").read_text())["global_step"] == 1


def test_train_refuses_an_option_nobody_knows(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(sys, "argv", ["chorus-moe", "train", str(recipe), "--learning_rte", "1"])
    with pytest.raises(SystemExit, match="did you mean '--learning_rate'"):
        cli.main()


def test_demo_hands_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from chorus_moe.training.demo import run as demo

    seen: list[list[str]] = []
    monkeypatch.setattr(demo, "main", lambda arguments: seen.append(list(arguments)))
    invoke("demo", "--out", "somewhere", "--seed", "3")
    assert seen == [["--out", "somewhere", "--seed", "3"]]
