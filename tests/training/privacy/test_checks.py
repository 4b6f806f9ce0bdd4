"""What would void the promise is refused by name, with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.training.objectives.objective import Objective
from chorus_moe.training.privacy.checks import check_private_recipe
from chorus_moe.training.readiness import check_recipe
from chorus_moe.training.recipe import read_recipe
from chorus_moe.training.stages import read_stages
from chorus_moe.training.tasks.arguments import TaskArguments
from chorus_moe.training.tasks.plan import plan_tasks
from tests.conftest import tiny_config
from tests.training.conftest import make_model, make_rows
from tests.training.privacy.conftest import make_trainer

QUIET = ["--report_to", "none", "--use_cpu", "true"]
PRIVATE = [*QUIET, "--use_privacy", "true", "--noise_multiplier", "1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--streaming", "true"], "privacy beside data.streaming: each update draws from all rows"),
        (["--use_tasks", "true"], "privacy beside tasks: rows are drawn by their task"),
        (["--router_reward_banks", "text"], "privacy beside routing.router_reward_banks"),
        (["--norm_ratio", "4"], "privacy beside guards.norm_ratio: whether a step is skipped would tell"),
        (["--head", "contrastive"], "privacy beside model.head: contrastive: a pair is told from the other pairs"),
        (["--config", "{}"], "privacy beside model.config without model.tokenizer: the tokenizer would be trained"),
    ],
)
def test_what_couples_rows_in_a_recipe_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_private_recipe(read_recipe(None, [*PRIVATE, *words]))


def test_settings_of_privacy_without_privacy_are_refused() -> None:
    with pytest.raises(ValueError, match="privacy.epsilon without privacy: write a privacy section"):
        check_recipe(read_recipe(None, [*QUIET, "--epsilon", "8"]))
    check_recipe(read_recipe(None, [*QUIET, "--use_privacy", "false", "--epsilon", "8"]))


def test_a_missing_opacus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chorus_moe.training.privacy.checks.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"opacus is not installed; pip install 'chorus-moe\[privacy\]'"):
        check_recipe(read_recipe(None, PRIVATE))


def test_stages_do_not_share_a_budget(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("privacy: {epsilon: 8}\nstages: [{name: one}, {name: two}]\n")
    with pytest.raises(ValueError, match="section 'privacy' belongs to one of them: each would spend its epsilon"):
        read_stages(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 is the norm to which each row's gradient is clipped"),
        ({"per_device_train_batch_size": 4}, "an update of 8 rows on average cannot be drawn from 6 rows"),
        ({"auto_find_batch_size": True}, "privacy beside training.auto_find_batch_size"),
        ({"optim": "schedule_free_adamw"}, "optim=schedule_free_adamw: it trains other weights than it saves"),
        ({"optim": "adalomo"}, "optim=adalomo: it takes its step within the backward of a row"),
    ],
)
def test_arguments_that_void_the_promise_are_refused(
    settings: dict[str, Any],
    message: str,
    model: ChorusForConditionalGeneration,
    processor: ChorusProcessor,
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(model, processor, tmp_path, **settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            {"expert_banks": {"common": {"balance": "bias", "router": "sigmoid"}}},
            "bank 'common' of layer 1 has balance=",
        ),
        ({"alignment_loss_coef": 0.1, "alignment": "contrastive"}, "tells the images of a batch apart"),
    ],
)
def test_models_whose_rows_are_coupled_are_refused(
    text: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    model = make_model(tokenizer, **text)
    with pytest.raises(ValueError, match=message):
        make_trainer(model, processor, tmp_path)
    if "expert_banks" in text:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".router." not in name)
        make_trainer(model, processor, tmp_path)


def test_trained_batch_norms_and_halves_are_refused_and_frozen_ones_taken(
    tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, tmp_path: Path
) -> None:
    values = tiny_config(vocab_size=len(tokenizer)).to_dict()
    args = {"channels": [8, 8, 8, 8], "stem_width": 8, "output_stride": 8}
    values["vision_config"] = {"architecture": "resnet10t", "model_args": args, "image_size": 32, "pool_size": 2}
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(type(tiny_config())(**json.loads(json.dumps(values, default=str))))
    with pytest.raises(ValueError, match=r"vision_tower.* is a batch norm that is trained, as are \d+ others"):
        make_trainer(model, processor, tmp_path)
    model.model.vision_tower.requires_grad_(False)
    make_trainer(model, processor, tmp_path)
    with pytest.raises(ValueError, match=r"is trained in torch.bfloat16"):
        make_trainer(model.to(torch.bfloat16), processor, tmp_path)


def test_tasks_and_data_without_a_length_are_refused(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, tmp_path: Path
) -> None:
    rows = [row | {"task": "a"} for row in make_rows(6)]
    plan = plan_tasks(TaskArguments(use_tasks=True), rows)  # type: ignore[arg-type]  # a list of rows does as well
    with pytest.raises(ValueError, match="privacy beside tasks"):
        make_trainer(model, processor, tmp_path, rows=rows, parts={"tasks": plan})
    with pytest.raises(ValueError, match="the training data have no length"):
        make_trainer(model, processor, tmp_path, rows=Endless())  # type: ignore[arg-type]


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self) -> Any:
        yield from ()


def test_the_parameters_of_a_further_term_are_private_too(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, tmp_path: Path
) -> None:
    class Push(Objective):
        def __init__(self) -> None:
            super().__init__("push")
            self.shift = torch.nn.Parameter(torch.zeros(()))

        def forward(self, *_: Any) -> torch.Tensor:
            return 1e3 * self.shift

    term = Push()
    trainer = make_trainer(
        model, processor, tmp_path, {"noise_multiplier": 1e-9}, parts={"objectives": [term]}, max_grad_norm=0.5,
        max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    # Each row pushes with 1,000, is clipped to 0.5, and is one of 4 on average; the others are next to nothing.
    assert 0 < -float(term.shift.detach()) <= 6 * 0.5 / 4 + 1e-6
