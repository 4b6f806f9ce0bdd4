"""The merged sequence: placeholders against features, derived modalities, idle towers, losses without labels."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from chorus_moe import ChorusConfig, ChorusForConditionalGeneration, ChorusModel
from chorus_moe.modeling.modeling_chorus import check_placeholders, frozen_batch_norm
from chorus_moe.modeling.tower_audio import ChorusAudioOutput
from tests.conftest import AUDIO_TOKEN, IMAGE_TOKEN, tiny_config

Batch = dict[str, Tensor]


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def text_of(batch: Batch) -> Batch:
    """The same batch with every placeholder turned into a word."""
    input_ids = batch["input_ids"].masked_fill(batch["mm_token_type_ids"] > 0, 7)
    return {"input_ids": input_ids, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}


def test_too_few_placeholders_name_the_sample_and_both_numbers(model: ChorusForConditionalGeneration, batch: Batch):
    batch["input_ids"][2, 6] = 9
    with pytest.raises(ValueError, match="sample 2: found 3 image placeholders for 4 image tokens"):
        model(**batch)


def test_too_few_audio_placeholders_name_the_sample(model: ChorusForConditionalGeneration, batch: Batch):
    batch["input_ids"][1, 4] = 9
    with pytest.raises(ValueError, match="sample 1: found 2 audio placeholders for 3 audio tokens"):
        model(**batch)


def test_truncated_text_is_named_as_the_likely_reason(model: ChorusForConditionalGeneration, batch: Batch):
    cut = {
        name: value[:, :9] if name in ("input_ids", "attention_mask", "mm_token_type_ids", "labels") else value
        for name, value in batch.items()
    }
    with pytest.raises(ValueError, match=r"sample 2: found 3 image placeholders for 4 .* truncated"):
        model(**cut)


def test_a_missing_image_is_an_error(model: ChorusForConditionalGeneration, batch: Batch):
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="sample 0: found 4 image placeholders for 0 image tokens"):
        model(**batch)


def test_an_image_without_placeholders_is_an_error(model: ChorusForConditionalGeneration, batch: Batch):
    batch["pixel_values"] = torch.cat([batch["pixel_values"]] * 2)
    with pytest.raises(ValueError, match="found 8 image placeholders in the batch for 16 image tokens: 2 of 4"):
        model(**batch)


@pytest.mark.parametrize(
    ("found", "sizes"), [([4, 0, 8], [4, 4, 4]), ([0, 0], []), ([5, 3], [2, 3, 3]), ([], []), ([0, 7], [7])]
)
def test_whole_pieces_match_their_samples(found: list[int], sizes: list[int]):
    check_placeholders(found, sizes, "image")


def test_placeholders_must_fit_sample_by_sample_even_if_the_totals_agree():
    with pytest.raises(ValueError, match="sample 0: found 3 image placeholders for 4"):
        check_placeholders([3, 5], [4, 4], "image")


def test_image_tokens_stand_exactly_where_their_placeholders_are(model: ChorusForConditionalGeneration, batch: Batch):
    seen: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
        images = model.get_image_features(batch["pixel_values"]).pooler_output
        clips = model.get_audio_features(batch["input_features"], batch["input_features_mask"]).pooler_output
    hook.remove()
    assert torch.equal(seen[0][batch["input_ids"] == IMAGE_TOKEN], images.flatten(0, 1))
    assert torch.equal(seen[0][batch["input_ids"] == AUDIO_TOKEN], torch.cat(clips))


def test_missing_mm_token_type_ids_are_derived(model: ChorusForConditionalGeneration, batch: Batch):
    with torch.no_grad():
        given = model(**batch).logits
        del batch["mm_token_type_ids"]
        derived = model(**batch).logits
    assert torch.equal(given, derived)


def test_an_unknown_modality_is_an_error(model: ChorusForConditionalGeneration, batch: Batch):
    batch["mm_token_type_ids"][1, 0] = 2
    with pytest.raises(ValueError, match=r"mm_token_type_ids holds \[2\] in 1 of 72 tokens"):
        model(**batch)


def test_raw_inputs_and_encoder_outputs_together_are_an_error(model: ChorusForConditionalGeneration, batch: Batch):
    encoded = {"image": model.get_image_features(batch["pixel_values"])}
    with pytest.raises(ValueError, match="raw image inputs and mm_encoder_outputs for image"):
        model(**batch, mm_encoder_outputs=encoded)


@pytest.mark.parametrize("training", [False, True])
def test_outputs_of_the_towers_go_through_the_connectors(
    training: bool, model: ChorusForConditionalGeneration, batch: Batch
):
    raw = {name: batch.pop(name) for name in ("pixel_values", "input_features", "input_features_mask")}
    below = model.train(training).model
    with torch.no_grad():
        states = {
            "image": below.vision_tower(raw["pixel_values"]),
            "audio": below.audio_tower(raw["input_features"], raw["input_features_mask"]),
        }
        expected = model(**batch, **raw).loss
        assert torch.equal(model(**batch, mm_encoder_outputs=states).loss, expected)


def test_outputs_of_no_items_let_the_towers_rest_and_keep_the_connectors_in_the_graph(
    model: ChorusForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
):
    for tower in (model.model.vision_tower, model.model.audio_tower):
        monkeypatch.setattr(tower, "forward", None)
    none = {
        "image": BaseModelOutputWithPooling(last_hidden_state=torch.zeros(0, 16, 32)),
        "audio": ChorusAudioOutput(torch.zeros(0, 1, 32), torch.zeros(0, 1, dtype=torch.bool)),
    }
    ids = torch.arange(5, 15)[None]
    model.train()(input_ids=ids, labels=ids, mm_encoder_outputs=none).loss.backward()
    connectors = [model.model.vision_connector, model.model.audio_connector]
    gradients = [parameter.grad for connector in connectors for parameter in connector.parameters()]
    # Zeros and not None: other ranks wait for them.
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("given", [{}, {"input_ids", "inputs_embeds"}])
def test_exactly_one_of_ids_and_embeddings(model: ChorusForConditionalGeneration, given: set[str]):
    inputs: dict[str, Any] = {"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, 64)}
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**{name: inputs[name] for name in given})


def test_merged_embeddings_give_the_same_logits(model: ChorusForConditionalGeneration, batch: Batch):
    with torch.no_grad():
        expected = model(**batch).logits
        embeds = model.get_input_embeddings()(batch["input_ids"])
        images = model.get_image_features(batch["pixel_values"]).pooler_output.flatten(0, 1)
        embeds[batch["input_ids"] == IMAGE_TOKEN] = images
        clips = model.get_audio_features(batch["input_features"], batch["input_features_mask"]).pooler_output
        embeds[batch["input_ids"] == AUDIO_TOKEN] = torch.cat(clips)
        keep = {name: batch[name] for name in ("attention_mask", "mm_token_type_ids")}
        merged = model(inputs_embeds=embeds, **keep).logits
    assert torch.equal(expected, merged)


@pytest.mark.parametrize("missing", ["vision", "audio"])
def test_a_model_without_a_tower_refuses_its_input(missing: str, batch: Batch):
    config = tiny_config().to_dict()
    del config[f"{missing}_config"]
    config["image_token_id" if missing == "vision" else "audio_token_id"] = None
    small = ChorusModel(ChorusConfig(**config))
    name = "pixel_values" if missing == "vision" else "input_features"
    with pytest.raises(ValueError, match=f"this model has no {missing} tower"):
        small(input_ids=batch["input_ids"] + 5, **{name: batch[name]})


def test_a_text_only_loss_is_bit_equal_with_and_without_idle_towers(
    model: ChorusForConditionalGeneration, batch: Batch
):
    model.train()
    inputs = text_of(batch)
    with_towers = model(**inputs).loss
    towers = model.model.vision_tower, model.model.audio_tower
    model.model.vision_tower = model.model.audio_tower = None
    without_towers = model(**inputs).loss
    model.model.vision_tower, model.model.audio_tower = towers
    assert torch.equal(with_towers, without_towers)


@pytest.mark.parametrize("kind", ["text", "image", "audio", "all"])
def test_every_parameter_has_a_finite_gradient_whatever_the_batch_holds(
    model: ChorusForConditionalGeneration, batch: Batch, kind: str
):
    sample = {"text": [], "image": [0], "audio": [1], "all": [0, 1, 2]}[kind]
    inputs = (
        text_of(batch) if kind == "text" else {n: batch[n][sample] for n in ("input_ids", "attention_mask", "labels")}
    )
    if kind in ("image", "all"):
        inputs["pixel_values"] = batch["pixel_values"][: len(sample)]
    if kind in ("audio", "all"):
        inputs["input_features"] = batch["input_features"][: 1 if kind == "audio" else 2]
        inputs["input_features_mask"] = batch["input_features_mask"][: 1 if kind == "audio" else 2]
    model.train()(**inputs).loss.backward()
    missing = [name for name, grad in gradients(model).items() if grad is None or not grad.isfinite().all()]
    assert missing == []


def test_idle_towers_get_zero_gradients(model: ChorusForConditionalGeneration, batch: Batch):
    model.train()(**text_of(batch)).loss.backward()
    for name, grad in gradients(model).items():
        if any(
            part in name for part in ("vision_", "audio_", "banks.image", "banks.audio", "proj.image", "proj.audio")
        ):
            assert not grad.any(), name


def test_an_idle_tower_runs_exactly_once(model: ChorusForConditionalGeneration, batch: Batch):
    calls = []
    for tower in (model.model.vision_tower, model.model.audio_tower):
        tower.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    model.train()(**text_of(batch))
    assert sorted(calls) == ["ChorusAudioModel", "ChorusVisionModel"]


def test_no_tower_runs_idle_in_evaluation(model: ChorusForConditionalGeneration, batch: Batch):
    calls = []
    for tower in (model.model.vision_tower, model.model.audio_tower):
        tower.register_forward_hook(lambda *_: calls.append(1))
    model.eval()(**text_of(batch))
    assert calls == []


def test_batch_norm_statistics_ignore_idle_input(batch: Batch):
    config = tiny_config().to_dict()
    config["vision_config"] = {"architecture": "resnet18", "image_size": 32, "model_args": {"layers": [1, 1, 1, 1]}}
    model = ChorusForConditionalGeneration(ChorusConfig(**config)).train()
    before = {name: value.clone() for name, value in model.model.vision_tower.named_buffers()}
    assert before
    model(**text_of(batch)).loss.backward()
    for name, value in model.model.vision_tower.named_buffers():
        assert torch.equal(value, before[name]), name


def test_batch_norm_trains_again_after_an_idle_forward():
    norms = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm1d(2).eval())
    with frozen_batch_norm(norms):
        assert not norms[0].training
    assert norms[0].training
    assert not norms[1].training


@pytest.mark.parametrize("num_items", [None, 0, 5])
def test_a_batch_without_labels_has_loss_zero_and_finite_gradients(
    model: ChorusForConditionalGeneration, batch: Batch, num_items: int | None
):
    model.config.text_config.router_aux_loss_coef = 0.0
    batch["labels"] = torch.full_like(batch["labels"], -100)
    extra = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    loss = model.train()(**batch, **extra).loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(model).values())


def test_evaluation_adds_no_router_term_to_the_loss(model: ChorusForConditionalGeneration, batch: Batch):
    with torch.no_grad():
        plain = model(**batch).loss
        output = model(**batch, output_router_logits=True)
    assert output.aux_loss > 0
    assert torch.equal(plain, output.loss)


def test_training_adds_the_weighted_terms_to_the_loss(model: ChorusForConditionalGeneration, batch: Batch):
    text = model.config.text_config
    text.router_aux_loss_coef, text.router_z_loss_coef, text.alignment_loss_coef = 0.5, 0.25, 0.125
    output = model.train()(**batch)
    plain = model.eval()(**batch).loss
    added = 0.5 * output.aux_loss + 0.25 * output.z_loss + 0.125 * output.alignment_loss
    # float32 rounding of one addition at losses of size 5.
    torch.testing.assert_close(output.loss, plain + added, rtol=0, atol=2e-6)


def test_recorded_hidden_states_cover_every_layer(model: ChorusForConditionalGeneration, batch: Batch):
    output = model(**batch, output_hidden_states=True, output_router_logits=True)
    assert len(output.hidden_states) == model.config.text_config.num_hidden_layers + 1
    assert len(output.routing) == len(model.config.text_config.sparse_layers)
