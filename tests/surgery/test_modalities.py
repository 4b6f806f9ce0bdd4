"""A modality that is added changes nothing for inputs without it, and works like one that was always there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from chorus_moe import (
    ChorusConfig,
    ChorusForConditionalGeneration,
    ChorusForContrastive,
    ChorusForSequenceClassification,
)
from chorus_moe.modeling.modeling_text import ChorusTextModel
from chorus_moe.modeling.tower_audio import ChorusAudioModel
from chorus_moe.surgery import add_modality, freeze, unfreeze
from tests.conftest import AUDIO_TOKEN, IMAGE_TOKEN, tiny_batch, tiny_config
from tests.surgery.test_banks import Batch, logits_of

PARTS = {"image": ("vision_config", "image_token_id"), "audio": ("audio_config", "audio_token_id")}
TOKENS = {"image": IMAGE_TOKEN, "audio": AUDIO_TOKEN}


def config_without(*modalities: str, **text: Any) -> ChorusConfig:
    """Without encoders; the decoder has the parts of all modalities, as it was saved before it named its own."""
    values = tiny_config(**text).to_dict()
    return ChorusConfig(**values | {key: None for name in modalities for key in PARTS[name]})


def make(*modalities: str, kind: type = ChorusForConditionalGeneration, **text: Any) -> Any:
    torch.manual_seed(0)
    return kind(config_without(*modalities, **text)).eval()


def make_bare(*modalities: str, kind: type = ChorusForConditionalGeneration, **text: Any) -> Any:
    """As `make`, and the decoder takes no more than the model has."""
    torch.manual_seed(0)
    values = tiny_config().to_dict()
    given = values["text_config"] | {"modalities": None, "expert_banks": None} | text
    values |= {"text_config": given, "transformers_version": None} | {
        key: None for name in modalities for key in PARTS[name]
    }
    return kind(ChorusConfig(**values)).eval()


def tower_config(modality: str) -> Any:
    return getattr(tiny_config(), PARTS[modality][0])


def old_batch(modality: str) -> Batch:
    """A row of text and one medium, without the other."""
    batch, sounds = tiny_batch(tiny_config()), ("input_features", "input_features_mask")
    if modality == "image":
        row = {name: value[1:2] for name, value in batch.items() if name not in ("pixel_values", *sounds)}
        return row | {name: batch[name][:1, :11] for name in sounds}
    return {name: value[:1] for name, value in batch.items() if name not in sounds}


@pytest.mark.parametrize("kind", [ChorusForConditionalGeneration, ChorusForSequenceClassification])
@pytest.mark.parametrize("modality", PARTS)
def test_old_inputs_give_the_same_outputs_bit_for_bit(modality: str, kind: type):
    model, batch = make(modality, kind=kind), old_batch(modality)
    before = logits_of(model, batch)
    report = add_modality(model, modality, tower_config(modality), token_id=TOKENS[modality])
    assert torch.equal(logits_of(model, batch), before)
    assert report.parameters_after == sum(p.numel() for p in model.parameters()) > report.parameters_before


@pytest.mark.parametrize("modality", PARTS)
def test_the_new_model_is_one_that_was_built_with_the_modality(modality: str, tmp_path: Path, batch: Batch):
    model = make(modality)
    add_modality(model, modality, tower_config(modality).to_dict(), token_id=TOKENS[modality])
    built = ChorusForConditionalGeneration(tiny_config())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in built.named_parameters()]
    assert model.config.modalities == ["text", "image", "audio"]
    assert sorted(model.generation_config.suppress_tokens) == [IMAGE_TOKEN, AUDIO_TOKEN]
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded, batch), logits_of(model, batch))


def test_both_encoders_can_be_added_in_any_order(batch: Batch):
    model = make("image", "audio")
    for name in ("audio", "image"):
        add_modality(model, name, tower_config(name), token_id=TOKENS[name])
    built = ChorusForConditionalGeneration(tiny_config())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in built.named_parameters()]
    assert logits_of(model, batch).isfinite().all()


def test_a_ready_tower_keeps_its_weights():
    torch.manual_seed(5)
    tower = ChorusAudioModel(tower_config("audio"))
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    model = make("audio")
    add_modality(model, "audio", tower, token_id=AUDIO_TOKEN)
    assert model.model.audio_tower is tower
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_a_placeholder_without_a_number_is_a_new_token_whose_rows_are_means():
    model, batch = make("audio"), old_batch("audio")
    before = logits_of(model, batch)
    tables = [table.weight.detach().clone() for table in (model.get_input_embeddings(), model.lm_head)]
    freeze(model, "embeddings")
    add_modality(model, "audio", tower_config("audio"))
    assert (model.config.audio_token_id, model.config.text_config.vocab_size) == (128, 129)
    after = logits_of(model, batch)
    # A wider product may sum in another order; nothing was seen.
    torch.testing.assert_close(after[..., :128], before, atol=1e-6, rtol=0)
    for old, new in zip(tables, (model.get_input_embeddings(), model.lm_head), strict=True):
        assert torch.equal(new.weight[:128], old)
        torch.testing.assert_close(new.weight[128], old.mean(dim=0))
    assert not model.get_input_embeddings().weight.requires_grad
    assert model.lm_head.weight.requires_grad


def test_keys_and_values_of_the_modality_start_like_those_of_text():
    model = make("audio", share_cross_modal_query=False)
    add_modality(model, "audio", tower_config("audio"), token_id=AUDIO_TOKEN)
    attention = model.model.language_model.layers[2].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert torch.equal(projection["audio"].weight, projection["text"].weight)
        assert not torch.equal(projection["image"].weight, projection["text"].weight)


@pytest.mark.parametrize(
    ("banks", "asked", "expected"),
    [
        ({"text": {}, "image": {}}, None, ["audio", "image", "text"]),
        ({"text": {}, "common": {}}, None, ["common", "text"]),
        ({"text": {}, "common": {}}, {"num_experts": 3}, ["audio", "common", "text"]),
        ({"text": {}, "common": {}}, {"name": "sound"}, ["common", "sound", "text"]),
    ],
)
def test_a_bank_is_added_where_none_takes_the_modality_or_on_demand(
    banks: dict[str, Any], asked: dict[str, Any] | None, expected: list[str]
):
    model, batch = make("audio", expert_banks=banks), old_batch("audio")
    before = logits_of(model, batch)
    add_modality(model, "audio", tower_config("audio"), token_id=AUDIO_TOKEN, bank=asked)
    assert list(model.config.text_config.expert_banks) == expected
    assert torch.equal(logits_of(model, batch), before)


def test_the_new_modality_is_trained_alone(batch: Batch):
    model = make("audio", expert_banks={"text": {}, "image": {}})
    add_modality(model, "audio", tower_config("audio"), token_id=AUDIO_TOKEN)
    freeze(model, "all")
    unfreeze(model, "audio_tower", "audio_connector", "audio")
    model.train()(**batch).loss.backward()
    got = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert got == {"audio_tower", "audio_connector", "language_model"}


def test_the_contrastive_head_embeds_the_new_modality(tmp_path: Path):
    model = make("audio", kind=ChorusForContrastive)
    add_modality(model, "audio", tower_config("audio"), token_id=AUDIO_TOKEN)
    assert list(model.projections) == ["text", "image", "audio"]
    features = torch.randn(2, 11, 16)
    model.save_pretrained(tmp_path)
    loaded = ChorusForContrastive.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_audio_features(features), model.get_audio_features(features))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("image", tower_config("image")), "already has 'image'"),
        (("sound", tower_config("audio")), "unknown modality 'sound'"),
        (("audio", tower_config("image")), "is of type 'chorus_audio', found 'chorus_vision'"),
        (("audio", tower_config("audio"), IMAGE_TOKEN), "image_token_id and audio_token_id are both 3"),
        (("audio", tower_config("audio"), AUDIO_TOKEN, {"name": "x", "rooter": 1}), "unknown key 'rooter'"),
        (("audio", tower_config("audio"), AUDIO_TOKEN, {}), "add_bank: the model already has a bank 'audio'"),
        (("audio", {"hidden_size": 30}), "hidden_size=30 is not a multiple of num_attention_heads=4"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(arguments: tuple[Any, ...], message: str):
    model = make("audio")
    config, names = model.config.to_dict(), [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        add_modality(model, *arguments)
    assert model.config.to_dict() == config
    assert [name for name, _ in model.named_parameters()] == names


def test_a_decoder_alone_has_no_place_for_an_encoder():
    with pytest.raises(ValueError, match="ChorusTextModel has no place for an encoder"):
        add_modality(ChorusTextModel(tiny_config().text_config), "audio", tower_config("audio"))


def test_adapters_refuse_it():
    adapted = get_peft_model(make("audio"), LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(ValueError, match="add_modality: 3 modules carry adapters"):
        add_modality(adapted, "audio", tower_config("audio"), AUDIO_TOKEN)


@pytest.mark.parametrize("kind", [ChorusForConditionalGeneration, ChorusForSequenceClassification])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("modality", PARTS)
def test_a_decoder_that_took_less_takes_the_modality_and_changes_nothing_else(
    modality: str, share: bool, kind: type, tmp_path: Path, batch: Batch
):
    model, before = make_bare(modality, kind=kind, share_cross_modal_query=share), old_batch(modality)
    others = [name for name in ("text", "image", "audio") if name != modality]
    assert model.config.text_config.modalities == others
    outputs = logits_of(model, before)
    report = add_modality(model, modality, tower_config(modality), token_id=TOKENS[modality])
    assert torch.equal(logits_of(model, before), outputs)
    assert model.config.text_config.modalities == ["text", "image", "audio"]
    assert "bank 'common' takes it" in report.notes

    decoder = model.model.language_model
    assert sorted(decoder.banks) == sorted([*others, "common"])
    attention = decoder.layers[2].self_attn
    for projection in [attention.k_proj, attention.v_proj] + [attention.q_proj] * (not share):
        assert list(projection) == ["text", "image", "audio"]
        assert torch.equal(projection[modality].weight, projection["text"].weight)
        assert projection[modality].weight is not projection["text"].weight
    built = kind(model.config)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in built.named_parameters()]
    for layer in (1, 2):
        mixtures = [one.model.language_model.layers[layer].mlp for one in (model, built)]
        assert torch.equal(*(mixture.bank_gate.is_open for mixture in mixtures))
        assert mixtures[0].banks["common"].modalities == ["text", "image", "audio"]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(kind.from_pretrained(tmp_path), batch), logits_of(model, batch))


def test_both_encoders_can_be_added_to_a_text_model(batch: Batch):
    model = make_bare("image", "audio")
    for name in ("audio", "image"):
        add_modality(model, name, tower_config(name), token_id=TOKENS[name], bank={})
    assert sorted(model.model.language_model.banks) == ["audio", "common", "image", "text"]
    model.train()(**batch).loss.backward()
    attention = model.model.language_model.layers[2].self_attn
    assert all(attention.v_proj[name].weight.grad.any() for name in ("text", "image", "audio"))


def test_a_decoder_that_took_less_gets_a_bank_where_none_takes_all():
    model, batch = make_bare("audio", expert_banks={"text": {}, "image": {}}), old_batch("audio")
    before = logits_of(model, batch)
    add_modality(model, "audio", tower_config("audio"), token_id=AUDIO_TOKEN)
    assert list(model.config.text_config.expert_banks) == ["audio", "image", "text"]
    assert torch.equal(logits_of(model, batch), before)


def test_what_is_refused_changes_nothing_of_a_decoder_that_takes_less():
    model = make_bare("audio")
    config, names = model.config.to_dict(), [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="unknown key 'rooter'"):
        add_modality(model, "audio", tower_config("audio"), AUDIO_TOKEN, {"name": "x", "rooter": 1})
    assert model.config.to_dict() == config
    assert [name for name, _ in model.named_parameters()] == names
