"""Objectives of distillation against computations by hand, from teachers in memory and from files."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Categorical, kl_divergence
from transformers import PreTrainedTokenizerFast, TrainingArguments

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.surgery import freeze
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.objectives import masked
from chorus_moe.training.objectives.distillation import (
    DistilledRouters,
    DistilledStates,
    DistilledTokens,
    distillation_objectives,
)
from chorus_moe.training.objectives.distillation_arguments import DistillationArguments
from chorus_moe.training.objectives.masked import MaskedFeatures
from chorus_moe.training.objectives.teacher_files import TaughtRows, TeacherFiles, teacher_columns, write_teacher
from chorus_moe.training.objectives.teachers import Teacher
from chorus_moe.training.trainer import ChorusTrainer
from tests.fresh_process import ROOT, run_ranks
from tests.training.conftest import make_model, make_rows, make_tokenizer
from tests.training.objectives.test_teachers import expected, save_chorus, save_llama, text_row
from tests.training.test_checkpoints import SETTINGS

# float32 sums in another order, at divergences of size 1.
ATOL = 1e-5
WIDE = {"hidden_size": 96, "num_hidden_layers": 4, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}


@pytest.fixture
def inputs(processor: ChorusProcessor) -> dict[str, torch.Tensor]:
    return ChorusDataCollator(processor)(make_rows(3))


def run(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    return model(**{name: value for name, value in inputs.items() if not name.startswith("teacher")}, **options)


def test_the_loss_of_tokens_is_a_mean_over_labels(
    source: str, model: ChorusForConditionalGeneration, processor: ChorusProcessor, inputs: dict[str, torch.Tensor]
) -> None:
    teacher = Teacher([source], temperature=2.0)
    objective = DistilledTokens(teacher, loss="reverse_kl", temperature=2.0)
    objective.check(model, processor)
    found = objective(model, inputs, run(model, inputs))
    wanted = kl_divergence(
        Categorical(probs=expected(model, inputs, 2.0)), Categorical(probs=expected(teacher.models[0], inputs, 2.0))
    )
    torch.testing.assert_close(found, 4 * wanted.mean(), atol=ATOL, rtol=0)


def test_half_the_labels_in_rows_that_the_teacher_does_not_read_halve_the_loss(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model: Any, processor: ChorusProcessor
) -> None:
    save_llama(tmp_path, tokenizer, len(tokenizer))
    objective, collator = DistilledTokens(Teacher([str(tmp_path)])), ChorusDataCollator(processor)
    objective.check(model, processor)
    # Answers of equal length.
    picture, text = {**make_rows(3)[2], "messages": make_rows(3)[2]["messages"]}, text_row(2)
    alone, mixed = collator([text]), collator([picture, text])
    assert (alone["labels"] != -100).sum() * 2 == (mixed["labels"] != -100).sum()
    losses = [objective(model, inputs, run(model, inputs)) for inputs in (alone, mixed)]
    torch.testing.assert_close(losses[1], losses[0] / 2, atol=ATOL, rtol=0)
    unread = collator([picture])
    assert objective(model, unread, run(model, unread)) == 0


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_files_of_all_tokens_give_the_loss_and_gradient_of_the_teacher_itself(
    source: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, loss: str
) -> None:
    rows, student = make_rows(4), make_model(tokenizer).eval()
    teacher = Teacher([source], temperature=1.5)
    teacher.check(student.config, processor)
    write_teacher(tmp_path / "files", teacher, rows, ChorusDataCollator(processor), top_k=10**6, batch_size=3)
    files = TeacherFiles(tmp_path / "files")
    taught = TaughtRows(rows, files)
    batch = ChorusDataCollator(processor, more=[teacher_columns])([taught[index] for index in (3, 0, 2)])
    values, grads = [], []
    for origin in (teacher, files):
        student.zero_grad()
        value = DistilledTokens(origin, loss=loss, temperature=1.5)(student, batch, run(student, batch))
        value.backward()
        values.append(value.detach())
        grads.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    torch.testing.assert_close(values[0], values[1], atol=ATOL, rtol=0)
    # Gradients of up to 0.2 here; batches of other shapes round the teacher differently.
    torch.testing.assert_close(grads[0], grads[1], atol=ATOL, rtol=0)
    assert grads[0].abs().max() > 1e-3


def test_files_of_few_tokens_come_close_from_below(
    source: str, tmp_path: Path, model: Any, processor: ChorusProcessor
) -> None:
    rows, teacher, values = make_rows(3), Teacher([source]), []
    teacher.check(model.config, processor)
    for top_k in (4, 64, 10**6):
        write_teacher(tmp_path / str(top_k), teacher, rows, ChorusDataCollator(processor), top_k=top_k)
        files = TeacherFiles(tmp_path / str(top_k))
        batch = ChorusDataCollator(processor, more=[teacher_columns])(list(TaughtRows(rows, files)))
        values.append(DistilledTokens(files)(model, batch, run(model, batch)).item())
    assert 0 < values[0] < values[1] < values[2]


def test_states_of_equal_width_are_compared_as_they_are(
    source: str, model: Any, processor: ChorusProcessor, inputs: dict[str, torch.Tensor]
) -> None:
    teacher = Teacher([source])
    objective = DistilledStates(teacher, {1: 2, 3: 3}, (64, 64))
    objective.check(model, processor)
    assert not list(objective.parameters()) and objective.forward_options() == {"output_hidden_states": True}
    outputs = run(model, inputs, output_hidden_states=True)
    theirs = run(teacher.models[0], inputs, output_hidden_states=True).hidden_states
    parts = [
        (outputs.hidden_states[ours][b, s] - theirs[other][b, s]).square().sum() / theirs[other][b, s].square().sum()
        for ours, other in ((1, 2), (3, 3))
        for b, s in inputs["attention_mask"].nonzero().tolist()
    ]
    torch.testing.assert_close(objective(model, inputs, outputs), torch.stack(parts).mean(), atol=ATOL, rtol=ATOL)


def test_states_of_another_width_go_through_a_map_that_learns(
    wide: str, model: Any, processor: ChorusProcessor
) -> None:
    objective = DistilledStates(Teacher([wide]), {1: 2, 2: 4}, (64, 96))
    objective.check(model, processor)
    assert {name: tuple(p.shape) for name, p in objective.named_parameters()} == {
        "maps.1.weight": (96, 64),
        "maps.2.weight": (96, 64),
    }
    inputs = ChorusDataCollator(processor)(make_rows(3))
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
    losses = []
    with torch.no_grad():
        outputs = run(model, inputs, output_hidden_states=True)
    for _ in range(30):
        loss = objective(model, inputs, outputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_routers_follow_the_teachers_in_the_banks_that_both_have(
    source: str, model: Any, processor: ChorusProcessor, inputs: dict[str, torch.Tensor]
) -> None:
    teacher = Teacher([source])
    objective = DistilledRouters(teacher, {1: 2})
    objective.check(model, processor)
    outputs = run(model, inputs, output_router_logits=True)
    theirs = run(teacher.models[0], inputs, output_router_logits=True).routing[1]
    means = []
    for name, ours in outputs.routing[0].items():
        rows = kl_divergence(Categorical(logits=theirs[name].router_logits), Categorical(logits=ours.router_logits))
        means.append(rows.mean() if ours.token_mask is None else rows[ours.token_mask].mean())
    torch.testing.assert_close(objective(model, inputs, outputs), torch.stack(means).mean(), atol=ATOL, rtol=0)


def test_banks_without_rows_are_left_out_of_the_mean_and_keep_their_routers_in_the_graph(
    source: str, model: Any, processor: ChorusProcessor
) -> None:
    inputs = ChorusDataCollator(processor)([text_row(0)])
    objective = DistilledRouters(Teacher([source]), {1: 2})
    objective.check(model, processor)
    outputs = run(model, inputs, output_router_logits=True)
    theirs = run(objective.teacher.models[0], inputs, output_router_logits=True).routing[1]
    means = [
        kl_divergence(Categorical(logits=theirs[name].router_logits), Categorical(logits=ours.router_logits)).mean()
        for name, ours in outputs.routing[0].items()
        if len(ours.router_logits)
    ]
    assert 0 < len(means) < len(objective.pairs)
    loss = objective(model, inputs, outputs)
    torch.testing.assert_close(loss, torch.stack(means).mean(), atol=ATOL, rtol=0)
    loss.backward()
    routers = [bank.router for bank in model.model.language_model.layers[1].mlp.banks.values()]
    assert all(parameter.grad is not None for router in routers for parameter in router.parameters())


def test_a_router_follows_groups_of_a_larger_banks_experts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model: Any, processor: ChorusProcessor
) -> None:
    save_chorus(tmp_path / "eight", tokenizer, num_experts=8)
    save_chorus(tmp_path / "six", tokenizer, num_experts=6)
    inputs = ChorusDataCollator(processor)(make_rows(3))
    teacher = Teacher([str(tmp_path / "eight")])
    objective = DistilledRouters(teacher, {2: 2})
    objective.check(model, processor)
    outputs = run(model, inputs, output_router_logits=True)
    theirs = run(teacher.models[0], inputs, output_router_logits=True).routing[1]["image"].router_logits.softmax(-1)
    grouped = torch.stack([theirs[:, 2 * e] + theirs[:, 2 * e + 1] for e in range(4)], dim=1)
    wanted = kl_divergence(
        Categorical(probs=grouped), Categorical(logits=outputs.routing[1]["image"].router_logits)
    ).mean()
    objective.pairs = [pair for pair in objective.pairs if pair[2].name == "image"]
    torch.testing.assert_close(objective(model, inputs, outputs), wanted, atol=ATOL, rtol=0)
    with pytest.raises(ValueError, match="has 4 experts, the teacher's 6, which is no multiple"):
        DistilledRouters(Teacher([str(tmp_path / "six")]), {2: 2}).check(model, processor)


def test_a_teacher_is_no_part_of_an_objective(source: str) -> None:
    teacher = Teacher([source])
    for objective in (DistilledTokens(teacher), DistilledStates(teacher, {1: 1}, (64, 64))):
        assert not list(objective.parameters()) and not objective.state_dict()
        objective.train()
        assert not teacher.models[0].training


def test_under_autocast_the_loss_is_that_of_float32_up_to_rounding(
    source: str, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, inputs: dict[str, torch.Tensor]
) -> None:
    student, teacher = make_model(tokenizer), Teacher([source])
    states, routers = DistilledStates(teacher, {2: 2}, (64, 64)), DistilledRouters(teacher, {1: 1})
    objectives = [DistilledTokens(teacher), states, routers]
    for objective in objectives:
        objective.check(student, processor)
    options = {"output_hidden_states": True, "output_router_logits": True}
    exact = [objective(student, inputs, run(student, inputs, **options)) for objective in objectives]
    teacher._last = None
    with torch.autocast("cpu", torch.bfloat16):
        rounded = [objective(student, inputs, run(student, inputs, **options)) for objective in objectives]
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=0, rtol=0.05)


def recipe(**values: Any) -> DistillationArguments:
    return DistillationArguments(**values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"distilled_layers": '{"1": 4}'}, "distilled_layers: the teacher has layers 0 to 3, found 4"),
        ({"distilled_layers": '{"7": 1}'}, "distilled_layers: the student has layers 0 to 3, found 7"),
        ({"distilled_layers": '{"a": 1}'}, "distilled_layers: expected numbers of layers"),
        ({"distilled_routers": '{"0": 1}'}, r"the student has the sparse layers \[1, 2\], found 0"),
        ({"distilled_routers": '{"1": 3}'}, r"the teacher has the sparse layers \[1, 2\], found 3"),
        ({"distillation_weight": 0.0}, "distillation_weight=0, and neither"),
    ],
)
def test_layers_that_do_not_exist_are_refused(
    source: str, model: Any, processor: ChorusProcessor, values: dict[str, Any], said: str
) -> None:
    def check() -> None:
        for objective in distillation_objectives(recipe(teachers=[source], **values), model, processor)[0]:
            objective.check(model, processor)

    with pytest.raises(ValueError, match=said):
        check()


def test_states_and_routers_are_those_of_one_chorus_model(
    source: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model: Any, processor: ChorusProcessor
) -> None:
    with pytest.raises(ValueError, match="distilled_layers needs one teacher, found 2"):
        distillation_objectives(recipe(teachers=[source] * 2, distilled_layers='{"1": 1}'), model, processor)
    save_llama(tmp_path / "llama", tokenizer, len(tokenizer))
    asked = recipe(teachers=[str(tmp_path / "llama")], distilled_routers='{"1": 1}')
    objectives, files = distillation_objectives(asked, model, processor)
    assert files is None
    with pytest.raises(ValueError, match=r"distilled_routers: teacher '.*llama' has no banks of a Chorus model"):
        objectives[-1].check(model, processor)


def test_a_recipe_without_a_teacher_asks_for_nothing(model: Any, processor: ChorusProcessor) -> None:
    assert distillation_objectives(recipe(), model, processor) == ([], None)


ALL = {"distilled_layers": '{"1": 2, "3": 4}', "distilled_routers": '{"2": 3}', "distillation_temperature": 2.0}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, trained_tokenizer: PreTrainedTokenizerFast) -> str:
    folder = tmp_path_factory.mktemp("wide")
    save_chorus(folder, copy.deepcopy(trained_tokenizer), **WIDE)
    return str(folder)


def trainer_of(
    folder: Path, student: Any, processor: ChorusProcessor, rows: Any, asked: DistillationArguments, **settings: Any
) -> ChorusTrainer:
    objectives, answers = distillation_objectives(asked, student, processor)
    given = SETTINGS | {"save_strategy": "no", "logging_steps": 1} | settings
    return ChorusTrainer(
        student,
        TrainingArguments(str(folder), **given),
        ChorusDataCollator(processor, more=[teacher_columns]),
        rows if answers is None else TaughtRows(rows, answers),
        processing_class=processor,
        objectives=objectives,
    )


def test_a_run_logs_each_term_and_saves_the_student_alone(
    wide: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor
) -> None:
    student, asked = make_model(tokenizer), recipe(teachers=[wide], **ALL)
    before = student.num_parameters()
    # A float32 student in bfloat16 arithmetic, as on most GPUs.
    trainer = trainer_of(tmp_path / "run", student, processor, make_rows(6), asked, bf16=True, max_steps=2)
    trainer.train()
    trainer.save_model()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert all(0 < log[name] < 100 for name in ("teacher_tokens", "teacher_states", "teacher_routers"))
    assert student.num_parameters() == before
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert saved.keys() <= student.state_dict().keys() | {name for name, _ in student.named_buffers()}
    assert not list((tmp_path / "run").glob("**/objectives*"))
    teacher = trainer.objectives.objectives[0].source.models[0]
    assert not teacher.training and all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("from_files", [False, True], ids=["teacher", "files"])
def test_a_resumed_run_ends_at_the_same_bits(
    from_files: bool, wide: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor
) -> None:
    rows, asked = make_rows(6), recipe(teachers=[wide], **ALL)
    if from_files:
        teacher = Teacher([wide])
        teacher.check(make_model(tokenizer).config, processor)
        write_teacher(tmp_path / "files", teacher, rows, ChorusDataCollator(processor), top_k=8)
        asked = recipe(teacher_logits=str(tmp_path / "files"))
    found = []
    for checkpoint in (None, str(tmp_path / "run/checkpoint-2")):
        # Dropout shows whether the random state is restored.
        student = make_model(tokenizer, attention_dropout=0.1)
        trainer = trainer_of(tmp_path / "run", student, processor, rows, asked, save_strategy="steps")
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append(student.state_dict() | trainer.objectives.state_dict())
    assert len(found[0]) == len(found[1]) and all(tensor.equal(found[1][name]) for name, tensor in found[0].items())
    assert any("maps.1" in name for name in found[0]) is not from_files


def test_accumulated_micro_batches_equal_one_batch(
    source: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor
) -> None:
    # Answers of other lengths: a mean of means would differ.
    rows = [text_row(index) for index in range(4)]
    rows[0]["messages"] = [rows[0]["messages"][0], {"role": "assistant", "content": "three four five three"}]
    found = []
    for size in (4, 1):
        student = make_model(tokenizer, router_aux_loss_coef=0.0, router_z_loss_coef=0.0, alignment_loss_coef=0.0)
        options = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "learning_rate": 0.1, "weight_decay": 0.0}
        options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer_of(tmp_path, student, processor, rows, recipe(teachers=[source]), **options).train()
        found.append(student.state_dict())
    start = make_model(tokenizer).lm_head.weight
    assert (found[0]["lm_head.weight"] - start).abs().max() > 1e-4
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


def distributed_trainer(folder: Path, **settings: Any) -> ChorusTrainer:
    """The Trainer of `distributed_objectives`: a wider teacher, and masked images that only some rows have."""
    tokenizer = make_tokenizer()
    off = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, "alignment_loss_coef": 0.0}
    student = make_model(tokenizer, **off)
    freeze(student, "towers")
    processor = processor_from_config(student.config, tokenizer)
    # Without momentum: Adam turns a rounding into a step where a gradient is nearly zero.
    plain = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "max_grad_norm": 0.0} | settings
    asked = recipe(teachers=[str(folder / "teacher")], **ALL)
    objectives = [*distillation_objectives(asked, student, processor)[0], MaskedFeatures("image", student)]
    return ChorusTrainer(
        student,
        TrainingArguments(str(folder / "run"), **SETTINGS | {"save_strategy": "no"} | plain),
        ChorusDataCollator(processor),
        make_rows(12),
        processing_class=processor,
        objectives=objectives,
    )


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    save_chorus(tmp_path / "teacher", tokenizer, **WIDE)
    for done in run_ranks(ROOT / "tests/training/distributed_objectives.py", [str(tmp_path)], cwd=tmp_path):
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    # The same micro-batches, one after the other.
    alone = distributed_trainer(tmp_path, gradient_accumulation_steps=2)
    start = {name: tensor.clone() for name, tensor in alone.objectives.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masked, "draw", first_half)
        alone.train()
    for name, tensor in (alone.model.state_dict() | alone.objectives.state_dict()).items():
        assert first[name].equal(second[name]), f"the ranks differ in {name}"
        torch.testing.assert_close(first[name], tensor, atol=1e-5, rtol=1e-3, msg=name)
    # The maps of states, the hidden tokens' embedding and their prediction.
    assert len(start) == 5 and not any(first[name].equal(tensor) for name, tensor in start.items())


def first_half(is_token_BS: torch.Tensor, share: float) -> torch.Tensor:
    """In place of a draw, which differs between ranks."""
    return is_token_BS & (is_token_BS.cumsum(dim=1) <= is_token_BS.sum(dim=1, keepdim=True) * share)
