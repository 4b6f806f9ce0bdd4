"""One model of a pretrained text model and encoders."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.tower_vision import ChorusVisionModel
from chorus_moe.surgery import compose_plan
from chorus_moe.surgery.compose_plan import compose_checkpoint, plan_composition
from chorus_moe.surgery.tokenizer import add_media_tokens, build_tokenizer
from tests.conftest import tiny_batch
from tests.modeling.text_parents import (
    MIXTURES,
    PARENTS,
    VOCABULARY,
    make_parent,
    prompts,
    save_parent,
    text_difference,
    tiny_towers,
)
from tests.parents import build

# Sums in another order, float32: the worst difference seen over all parents is 3.7e-6, at logits up to 3.
ATOL = 1e-5
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def compose(folder: Path, vision: Any = None, audio: Any = None, **options: Any) -> ChorusForConditionalGeneration:
    return build(folder, vision, audio, **options)


def assert_equal_states(found: nn.Module, expected: nn.Module) -> None:
    found_state, expected_state = found.state_dict(), expected.state_dict()
    assert found_state.keys() == expected_state.keys()
    assert not [name for name, value in expected_state.items() if not torch.equal(found_state[name], value)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, save_parent(folder)


@pytest.fixture(scope="module")
def composed(llama: tuple[Path, Any]) -> ChorusForConditionalGeneration:
    return compose(llama[0], *tiny_towers(), num_experts=4)


@pytest.mark.parametrize("name", PARENTS)
def test_text_is_computed_as_by_the_parent(name: str, tmp_path: Path):
    model_type, settings = PARENTS[name]
    parent = save_parent(tmp_path, model_type, **settings)
    model = compose(tmp_path, None, tiny_towers()[1], num_experts=None if name in MIXTURES else 4)
    assert text_difference(model, parent) < ATOL
    assert model.generate(**prompts(), **GREEDY).tolist() == parent.generate(**prompts(), **GREEDY).tolist()
    alone = prompts()["input_ids"][:1]
    assert model.generate(alone, **GREEDY).tolist() == parent.generate(alone, **GREEDY).tolist()
    model.save_pretrained(tmp_path / "saved")
    assert_equal_states(ChorusForConditionalGeneration.from_pretrained(tmp_path / "saved"), model)


@pytest.mark.parametrize("options", [{}, {"expert_split": 2, "expert_noise": 0.1}], ids=["copies", "split and noise"])
def test_a_checkpoint_written_straight_away_is_the_same_model(
    llama: tuple[Path, Any], tmp_path: Path, options: dict[str, Any]
):
    model = compose(llama[0], *tiny_towers(), num_experts=4, **options)
    report = compose_checkpoint(tmp_path, llama[0], *tiny_towers(), num_experts=4, max_shard_size="200KB", **options)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path)
    assert_equal_states(loaded, model)
    assert loaded.config.to_dict() | {"transformers_version": None, "_name_or_path": None} == (
        model.config.to_dict()
        | {"transformers_version": None, "_name_or_path": None, "architectures": ["ChorusForConditionalGeneration"]}
    )
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())


def test_a_folder_with_a_checkpoint_is_not_written_into(llama: tuple[Path, Any]):
    with pytest.raises(ValueError, match=r"holds a checkpoint already, such as 'model.safetensors'"):
        compose_checkpoint(llama[0], llama[0])


def test_a_tied_parent_is_written_without_a_head(tmp_path: Path):
    parent = save_parent(tmp_path / "parent", tie_word_embeddings=True)
    compose_checkpoint(tmp_path / "child", tmp_path / "parent")
    assert "lm_head.weight" not in load_file(tmp_path / "child" / "model.safetensors")
    model = ChorusForConditionalGeneration.from_pretrained(tmp_path / "child")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert text_difference(model, parent) < ATOL


def test_composing_twice_gives_the_same_model_and_leaves_the_generator_alone(
    llama: tuple[Path, Any], composed: ChorusForConditionalGeneration
):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = compose(llama[0], *tiny_towers(), num_experts=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert_equal_states(again, composed)
    other = compose(llama[0], *tiny_towers(), num_experts=4, seed=1)
    routers = [name for name in other.state_dict() if ".router." in name]
    assert all(not torch.equal(other.state_dict()[name], composed.state_dict()[name]) for name in routers)


def test_images_and_sound_run_through_and_a_step_lowers_the_loss(llama: tuple[Path, Any]):
    model = compose(llama[0], *tiny_towers(), num_experts=4).train()
    batch = tiny_batch(model.config)
    ids = {3: model.config.image_token_id, 4: model.config.audio_token_id}
    modality = batch["mm_token_type_ids"]
    batch["input_ids"] = batch["input_ids"] % VOCABULARY
    batch["input_ids"][modality == 1], batch["input_ids"][modality == 3] = ids[3], ids[4]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(2):
        loss = model(**(batch | {"labels": batch["input_ids"].masked_fill(modality > 0, -100)})).loss
        loss.backward()
        losses.append(loss.item())
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]


def test_keys_and_values_of_every_modality_start_as_the_parents(composed: Any, llama: tuple[Path, Any]):
    attention = composed.model.language_model.layers[3].self_attn
    expected = llama[1].model.layers[3].self_attn
    assert torch.equal(attention.q_proj.weight, expected.q_proj.weight)
    for name in ("k_proj", "v_proj"):
        ours, theirs = getattr(attention, name), getattr(expected, name).weight
        assert all(torch.equal(ours[modality].weight, theirs) for modality in ("text", "image", "audio"))
    weights = [attention.k_proj[modality].weight for modality in ("text", "image", "audio")]
    assert len({weight.data_ptr() for weight in weights}) == 3


def test_the_cross_modal_layers_are_the_callers_choice(llama: tuple[Path, Any]):
    model = compose(llama[0], None, tiny_towers()[1], cross_modal_layers=[0, 2])
    assert model.config.text_config.cross_modal_layers == [0, 2]
    assert text_difference(model, llama[1]) < ATOL


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
def test_new_rows_are_the_mean_of_the_parents(tied: bool, tmp_path: Path):
    parent = save_parent(tmp_path, tie_word_embeddings=tied)
    model = compose(tmp_path, *tiny_towers())
    assert (model.config.image_token_id, model.config.audio_token_id) == (VOCABULARY, VOCABULARY + 1)
    for ours, theirs in (
        (model.get_input_embeddings().weight, parent.get_input_embeddings().weight),
        (model.lm_head.weight, parent.lm_head.weight),
    ):
        assert ours.shape == (VOCABULARY + 2, 32)
        assert torch.equal(ours[:VOCABULARY], theirs)
        # The mean is summed in float64 and rounded once.
        expected = theirs.double().mean(dim=0).float().expand(2, -1)
        torch.testing.assert_close(ours[VOCABULARY:], expected, rtol=1e-6, atol=1e-8)


def save_tokenizer(folder: Path, has_media: bool) -> Any:
    names = {} if has_media else {"image_token": "<|picture|>", "audio_token": "<|noise|>"}
    tokenizer = build_tokenizer(["a few words"], vocab_size=261, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("has_media", [True, False], ids=["known tokens", "new tokens"])
def test_placeholders_have_the_ids_that_the_tokenizer_gives_them(has_media: bool, tmp_path: Path):
    save_parent(tmp_path, vocab_size=300)
    tokenizer = save_tokenizer(tmp_path, has_media)
    model = compose(tmp_path, *tiny_towers())
    add_media_tokens(tokenizer)
    found = [model.config.image_token_id, model.config.audio_token_id]
    assert found == tokenizer.convert_tokens_to_ids(["<image>", "<audio>"])


def test_a_padded_table_is_used_before_it_grows(tmp_path: Path):
    parent = save_parent(tmp_path, vocab_size=300)
    save_tokenizer(tmp_path, has_media=False)
    model = compose(tmp_path, *tiny_towers())
    assert model.config.text_config.vocab_size == 300
    assert torch.equal(model.get_input_embeddings().weight, parent.get_input_embeddings().weight)


def test_a_model_of_text_alone_has_no_placeholders_and_one_bank(llama: tuple[Path, Any]):
    model = compose(llama[0])
    text = model.config.text_config
    assert (model.config.image_token_id, model.config.audio_token_id, text.vocab_size) == (None, None, VOCABULARY)
    assert list(text.expert_banks) == ["text"]


def test_a_bank_with_a_gate_of_its_own_starts_with_a_new_gate(tmp_path: Path):
    save_parent(tmp_path)
    model = compose(tmp_path, *tiny_towers(), experts={"text": {}, "extra": {"gate": "own"}})
    gates = [p for name, p in model.named_parameters() if ".banks.extra.gate." in name]
    assert gates and all(torch.isfinite(gate).all() for gate in gates)


@pytest.mark.parametrize("model_type", ["llama", "olmoe"])
def test_a_model_of_three_modalities_has_their_banks(model_type: str, tmp_path: Path):
    save_parent(tmp_path, model_type, **({"num_experts": 4, "num_experts_per_tok": 2} if model_type == "olmoe" else {}))
    model = compose(tmp_path, *tiny_towers())
    common = [] if model_type == "olmoe" else ["common"]
    assert list(model.config.text_config.expert_banks) == ["audio", *common, "image", "text"]


def test_the_dtype_is_the_parents_unless_another_is_asked_for(tmp_path: Path):
    save_parent(tmp_path, dtype=torch.bfloat16)
    banks = {"text": {"router": "sigmoid"}}
    model = compose(tmp_path, *tiny_towers(), experts=banks)
    dtypes = {name: value.dtype for name, value in model.state_dict().items() if value.is_floating_point()}
    biases = {name for name in dtypes if "e_score_correction_bias" in name}
    assert len(biases) == 1
    assert {dtypes[name] for name in biases} == {torch.float32}  # whatever the model is cast to
    assert {dtypes[name] for name in dtypes.keys() - biases} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    assert compose(tmp_path, dtype="float32").dtype == torch.float32


def test_generation_settings_are_carried_over_and_placeholders_never_generated(tmp_path: Path):
    save_parent(tmp_path)
    GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=[2, 5], suppress_tokens=[7]).save_pretrained(
        tmp_path
    )
    settings = compose(tmp_path, *tiny_towers()).generation_config
    assert (settings.temperature, settings.eos_token_id) == (0.7, [2, 5])
    assert settings.suppress_tokens == [7, VOCABULARY, VOCABULARY + 1]


class EncoderParent:
    """Stands for a pretrained encoder."""

    def __init__(self, tower: ChorusVisionModel):
        self.config, self.tower = tower.config, tower
        self.reads = 0

    def tensors(self) -> Any:
        self.reads += 1
        yield from self.tower.state_dict().items()


@pytest.fixture
def encoder() -> EncoderParent:
    torch.manual_seed(3)
    tower = ChorusVisionModel(tiny_towers()[0])
    for parameter in tower.parameters():
        parameter.data.normal_()
    return EncoderParent(tower)


def test_an_encoder_is_taken_over_and_read_once(encoder: EncoderParent, llama: tuple[Path, Any]):
    model = compose(llama[0], encoder)
    assert_equal_states(model.model.vision_tower, encoder.tower)
    assert encoder.reads == 1


def test_a_tensor_that_an_encoder_lacks_is_named(encoder: EncoderParent, llama: tuple[Path, Any]):
    state: dict[str, Tensor] = dict(encoder.tower.state_dict())
    name = next(iter(state))
    del state[name]
    encoder.tower.state_dict = lambda: state  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match=f"the encoder has no tensor '{name}'"):
        compose(llama[0], encoder)


@pytest.mark.parametrize("is_stored", [False, True])
def test_a_tied_head_is_counted_once(is_stored: bool, tmp_path: Path):
    parent = save_parent(tmp_path, tie_word_embeddings=True)
    if is_stored:
        tensors = load_file(tmp_path / "model.safetensors")
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        save_file(tensors | head, tmp_path / "model.safetensors", metadata={"format": "pt"})
    plan = plan_composition(ChorusForConditionalGeneration, tmp_path, *tiny_towers(), num_experts=4)
    assert plan.report.parameters_before == sum(parameter.numel() for parameter in parent.parameters())
    assert plan.report.parameters_after == sum(parameter.numel() for parameter in plan.build().parameters())


def test_the_report_says_what_became_of_the_parts(llama: tuple[Path, Any]):
    plan = plan_composition(
        ChorusForConditionalGeneration, llama[0], *tiny_towers(), num_experts=4, sparse_layers=[1, 2]
    )
    model, report = plan.build(), plan.report
    assert report.operation == "compose"
    assert report.parameters_before == sum(parameter.numel() for parameter in make_parent().parameters())
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert report.experts == {name: {1: (0, 4), 2: (0, 4)} for name in ("text", "image", "audio", "common")}
    assert "vocabulary: 96 -> 98" in str(report)
    assert "image: encoder newly initialised; its connector is new" in report.notes


def test_the_report_names_the_parent_of_an_encoder(encoder: EncoderParent, llama: tuple[Path, Any]):
    encoder.source = "a folder of mine"
    notes = plan_composition(ChorusForConditionalGeneration, llama[0], encoder).report.notes
    assert "image: encoder from a folder of mine; its connector is new" in notes


@pytest.mark.parametrize("has_vision", [True, False])
def test_the_processor_is_made_of_the_parents_that_are_open(
    has_vision: bool, encoder: EncoderParent, llama: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
):
    encoder.source, encoder.revision = "someone/encoder", "main"  # type: ignore[attr-defined]
    plan = plan_composition(
        ChorusForConditionalGeneration, llama[0], encoder if has_vision else None, local_files_only=True
    )
    seen: list[Any] = []
    monkeypatch.setattr(compose_plan, "parent_tokenizer", lambda parent: parent)
    monkeypatch.setattr(compose_plan, "compose_processor", lambda *given, **options: seen.extend((*given, options)))
    plan.processor()
    config, tokenizer, image_source, options = seen
    assert (config, tokenizer) == (plan.model.config, plan.text)
    assert image_source == ("someone/encoder" if has_vision else None)
    assert options["vision_loading"]["revision"] == ("main" if has_vision else None)
    assert options["vision_loading"]["local_files_only"] and options["notes"] is plan.report.notes
