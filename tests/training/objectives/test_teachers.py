"""Teachers are frozen, speak of shared tokens, and are refused where their probabilities mean something else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributions import Categorical
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chorus_moe import ChorusForConditionalGeneration, ChorusForSequenceClassification, ChorusProcessor
from chorus_moe.surgery.processor import processor_from_config
from chorus_moe.surgery.tokenizer import add_media_tokens
from chorus_moe.training.collator import ChorusDataCollator
from chorus_moe.training.objectives.teacher_files import digest_of_teacher
from chorus_moe.training.objectives.teachers import Teacher, load_teacher, shared_vocabulary
from tests.conftest import tiny_config
from tests.parents import SIZES, plain_tokenizer
from tests.training.conftest import QUESTION, make_model, make_rows

ATOL = 1e-5


def save_chorus(folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int = 1, **text: Any) -> Any:
    model = make_model(tokenizer, seed, **text).eval()
    model.save_pretrained(folder)
    processor_from_config(model.config, copy.deepcopy(tokenizer)).save_pretrained(folder)
    return model


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, num_tokens: int, **changes: Any) -> LlamaForCausalLM:
    """A text model with the student's tokenizer, and logits for `num_tokens` ids."""
    torch.manual_seed(2)
    sizes = SIZES | {"num_key_value_heads": 1, "vocab_size": num_tokens, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def text_row(index: int) -> dict[str, Any]:
    answer = {"role": "assistant", "content": ("three", "four", "five")[index % 3]}
    return {"messages": [{"role": "user", "content": QUESTION}, answer], "images": [], "audio": []}


@pytest.fixture
def inputs(processor: ChorusProcessor) -> dict[str, torch.Tensor]:
    return ChorusDataCollator(processor)(make_rows(3))


def expected(model: Any, inputs: dict[str, torch.Tensor], temperature: float = 1.0) -> torch.Tensor:
    """Probabilities where a label is predicted, position by position."""
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return torch.stack(
        [
            (logits[sample, place - 1] / temperature).softmax(-1)
            for sample, labels in enumerate(inputs["labels"])
            for place in range(1, len(labels))
            if labels[place] != -100
        ]
    )


def test_a_chorus_teacher_speaks_of_the_labelled_positions(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor, inputs: dict[str, torch.Tensor]
) -> None:
    model = save_chorus(tmp_path, tokenizer)
    teacher = Teacher([str(tmp_path)], temperature=2.0)
    teacher.check(model.config, processor)
    answer = teacher.read(inputs)
    assert answer is not None and answer.samples.all()
    torch.testing.assert_close(answer.tokens.log_probs.exp(), expected(model, inputs, 2.0), atol=ATOL, rtol=0)
    labels = inputs["labels"]
    assert answer.positions[:, :-1].equal(labels[:, 1:] != -100) and not answer.positions[:, -1].any()
    assert teacher.read(inputs) is answer


@pytest.mark.parametrize("asked", ["asks_hidden_states", "asks_routing", None])
def test_a_teacher_keeps_the_states_that_an_objective_asks_for(
    source: str, inputs: dict[str, torch.Tensor], asked: str | None
) -> None:
    teacher = Teacher([source])
    if asked:
        setattr(teacher, asked, True)
    answer = teacher.read(inputs)
    assert answer is not None
    assert (answer.hidden_states is not None, answer.routing is not None) == (
        asked == "asks_hidden_states", asked == "asks_routing"
    )  # fmt: skip


def test_outputs_of_the_students_encoders_are_for_a_teacher_that_has_them_too(
    source: str, model: ChorusForConditionalGeneration, inputs: dict[str, Any]
) -> None:
    teacher, owner = Teacher([source]), Teacher([source], shares_encoders=True)
    pixels = inputs.pop("pixel_values")
    sound = inputs.pop("input_features"), inputs.pop("input_features_mask")
    features = {"image": owner.models[0].get_image_features(pixels), "audio": model.get_audio_features(*sound)}
    encoded = {**inputs, "mm_encoder_outputs": features}
    with pytest.raises(ValueError, match="the batch holds what the student's encoders made .* without cached features"):
        teacher.read(encoded)
    assert owner.read(encoded) is not None


def test_an_ensemble_is_the_mean_of_probabilities(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, inputs: dict[str, torch.Tensor]
) -> None:
    models = [save_chorus(tmp_path / str(seed), tokenizer, seed) for seed in (1, 2)]
    answer = Teacher([str(tmp_path / "1"), str(tmp_path / "2")]).read(inputs)
    mean = (expected(models[0], inputs) + expected(models[1], inputs)) / 2
    assert answer is not None
    torch.testing.assert_close(answer.tokens.log_probs.exp(), mean, atol=ATOL, rtol=0)
    assert Categorical(logits=answer.tokens.log_probs).probs.sum(-1).allclose(torch.ones(len(mean)))
    twice, once = (Teacher([str(tmp_path / "1")] * n).read(inputs) for n in (2, 1))
    assert twice is not None and once is not None
    torch.testing.assert_close(twice.tokens.log_probs, once.tokens.log_probs, atol=ATOL, rtol=0)


def test_a_text_model_reads_rows_of_text_alone(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    processor: ChorusProcessor,
    model: ChorusForConditionalGeneration,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # More logits than tokens, as models of a padded vocabulary have.
    llama = save_llama(tmp_path, tokenizer, len(tokenizer) + 13)
    teacher = Teacher([str(tmp_path)])
    teacher.check(model.config, processor)
    assert not teacher.reads_media and teacher.num_shared == len(tokenizer)
    collator = ChorusDataCollator(processor)
    mixed = collator([*make_rows(2), text_row(0), text_row(1)])
    answer, alone = teacher.read(mixed), collator([text_row(0), text_row(1)])
    assert answer is not None
    assert answer.samples.tolist() == [False, False, True, True]
    assert not answer.positions[:2].any()
    logits = llama(alone["input_ids"], attention_mask=alone["attention_mask"]).logits[..., : len(tokenizer)]
    wanted = logits[:, :-1][alone["labels"][:, 1:] != -100].log_softmax(-1)
    torch.testing.assert_close(answer.tokens.log_probs, wanted, atol=ATOL, rtol=0)
    assert teacher.read(collator(make_rows(2))) is None


def test_tokens_for_media_that_were_added_to_the_students_tokenizer_are_not_compared(tmp_path: Path) -> None:
    parent, ours = plain_tokenizer(), plain_tokenizer()
    add_media_tokens(ours)
    save_llama(tmp_path, parent, len(parent))
    config = tiny_config(vocab_size=len(ours))
    config.image_token_id, config.audio_token_id = ours.convert_tokens_to_ids(["<image>", "<audio>"])
    teacher = Teacher([str(tmp_path)])
    teacher.check(config, processor_from_config(config, ours))
    assert teacher.num_shared == len(parent) < len(ours)


def test_another_tokenizer_is_refused_with_its_first_other_token_and_both_sizes(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    other = plain_tokenizer()
    ours = {index: token for token, index in tokenizer.get_vocab().items()}
    theirs = {index: token for token, index in other.get_vocab().items()}
    first = next(index for index in range(len(theirs)) if theirs[index] != ours.get(index))
    with pytest.raises(ValueError, match="another tokenizer") as error:
        shared_vocabulary(other, tokenizer, "large")
    said = str(error.value)
    assert f"teacher 'large' has another tokenizer: its token {first} is {theirs[first]!r}" in said
    assert f"the student's is {ours[first]!r} ({len(theirs)} and {len(ours)} tokens)" in said
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<more>"])
    with pytest.raises(ValueError, match=f"token {len(tokenizer)} is '<more>', the student's does not exist"):
        shared_vocabulary(other, tokenizer, "large")


def test_pictures_in_another_form_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor
) -> None:
    model = save_chorus(tmp_path, tokenizer)
    teacher = Teacher([str(tmp_path)])
    processor.image_processor.image_mean = 0.4
    with pytest.raises(ValueError, match=r"reads image with image_processor.image_mean=0.5, the student with 0.4"):
        teacher.check(model.config, processor)


def test_another_processor_or_student_is_compared_anew(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor
) -> None:
    config = save_chorus(tmp_path, tokenizer).config
    teacher = Teacher([str(tmp_path)])
    teacher.check(config, processor)
    brighter = copy.deepcopy(processor)
    brighter.image_processor.image_mean = 0.4
    with pytest.raises(ValueError, match="image_mean"):
        teacher.check(config, brighter)
    # Of a student that sees nothing pictures are not compared.
    blind = copy.deepcopy(config)
    blind.vision_config, blind.text_config.modalities = None, ["text", "audio"]
    teacher.check(blind, brighter)
    with pytest.raises(ValueError, match="image_mean"):
        teacher.check(config, brighter)


def test_a_teacher_is_frozen_and_in_evaluation_mode(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    save_chorus(tmp_path, tokenizer)
    model = load_teacher(str(tmp_path), "bfloat16")
    assert not model.training and model.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["chorus", "llama"])
def test_an_adapter_is_a_teacher_as_well(
    kind: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, processor: ChorusProcessor
) -> None:
    folder = tmp_path / "base"
    base = save_chorus(folder, tokenizer) if kind == "chorus" else save_llama(folder, tokenizer, len(tokenizer))
    # Random from the start, so that the adapter changes what is said.
    config = LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(tmp_path / "adapter")
    teacher = Teacher([str(tmp_path / "adapter")])
    teacher.check(make_model(tokenizer).config, processor)
    inputs = ChorusDataCollator(processor)([text_row(0), text_row(1)])
    answer = teacher.read(inputs)
    assert answer is not None and teacher.reads_media is (kind == "chorus")
    known = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": inputs["labels"]}
    torch.testing.assert_close(answer.tokens.log_probs.exp(), expected(adapted, known), atol=ATOL, rtol=0)
    assert not any(parameter.requires_grad for parameter in teacher.models[0].parameters())
    assert digest_of_teacher(str(tmp_path / "adapter")) != digest_of_teacher(str(folder))


def test_what_predicts_no_tokens_is_no_teacher(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = tiny_config(vocab_size=len(tokenizer))
    ChorusForSequenceClassification(config).save_pretrained(tmp_path / "classes")
    with pytest.raises(ValueError, match="is a ChorusForSequenceClassification, which predicts no tokens"):
        load_teacher(str(tmp_path / "classes"))
    broken = save_chorus(tmp_path / "broken", tokenizer)
    broken.lm_head.weight.data[0, 0] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match="lm_head.weight holds NaN or infinity"):
        load_teacher(str(tmp_path / "broken"))
    with pytest.raises(FileNotFoundError, match="no model at"):
        load_teacher(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="names no teacher"):
        Teacher([])
    with pytest.raises(ValueError, match="teacher_dtype='int8'; choose from"):
        Teacher([str(tmp_path)], dtype="int8")
