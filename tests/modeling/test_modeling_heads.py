"""Classification and contrastive heads: losses, gradients, independence of batch mates."""

from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor

from chorus_moe import (
    ChorusConfig,
    ChorusForConditionalGeneration,
    ChorusForContrastive,
    ChorusForSequenceClassification,
)
from chorus_moe.modeling.losses import CONTRASTIVE_LOSSES, alignment_loss, balance_loss, mean_over_banks, z_loss
from tests.conftest import IMAGE_TOKEN, TEXT, tiny_batch, tiny_config

# float32 sums in another order: padding and batch mates, at values of size 1.
ATOL = 1e-5


def classifier(**text: Any) -> ChorusForSequenceClassification:
    torch.manual_seed(0)
    config = tiny_config(**text)
    config.num_labels = 5
    return ChorusForSequenceClassification(config).eval()


def contrastive(loss: str = "infonce", **text: Any) -> ChorusForContrastive:
    torch.manual_seed(0)
    config = tiny_config(**text)
    config.contrastive_loss = loss
    return ChorusForContrastive(config).eval()


def triples(size: int = 3) -> dict[str, Tensor]:
    """`size` texts, images and clips of different lengths that belong together."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, 128, (size, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    input_ids[1, 6:], attention_mask[1, 6:] = 0, 0
    mask = torch.arange(20)[None] < torch.tensor([20, 7, 13])[:size, None]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
        "input_features": torch.randn(size, 20, 16, generator=generator) * mask[..., None],
        "input_features_mask": mask.long(),
    }


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_classifier_learns_the_cross_entropy_of_its_logits(is_causal: bool):
    model = classifier(is_causal=is_causal)
    batch = tiny_batch(model.config) | {"labels": torch.tensor([0, 4, 2])}
    output = model(**batch)
    assert output.logits.shape == (3, 5)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, batch["labels"]), rtol=0, atol=1e-6)


def test_a_share_of_a_step_weighs_the_classifier_loss():
    model = classifier()
    batch = tiny_batch(model.config) | {"labels": torch.tensor([0, 4, 2])}
    with torch.no_grad():
        whole, share = model(**batch).loss, model(**batch, num_items_in_batch=12).loss
    torch.testing.assert_close(share, whole * 3 / 12, rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_classifier_ignores_padding_on_either_side(is_causal: bool):
    model = classifier(is_causal=is_causal)
    input_ids = torch.randint(5, 128, (1, 8))
    mask, fill = torch.ones_like(input_ids), torch.zeros(1, 4, dtype=torch.long)
    with torch.no_grad():
        expected = model(input_ids=input_ids).logits
        left = model(input_ids=torch.cat([fill, input_ids], 1), attention_mask=torch.cat([fill, mask], 1)).logits
        right = model(input_ids=torch.cat([input_ids, fill], 1), attention_mask=torch.cat([mask, fill], 1)).logits
    torch.testing.assert_close(left, expected, rtol=0, atol=ATOL)
    torch.testing.assert_close(right, expected, rtol=0, atol=ATOL)


def test_every_parameter_of_the_classifier_gets_a_gradient():
    model = classifier().train()
    model(**tiny_batch(model.config) | {"labels": torch.tensor([0, 4, 2])}).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_embeddings_are_unit_vectors():
    output = contrastive()(**triples())
    for vectors in (output.text_embeds, output.image_embeds, output.audio_embeds):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3), rtol=0, atol=1e-6)


def test_the_contrastive_loss_is_the_symmetric_cross_entropy_over_all_pairs():
    model = contrastive()
    output = model(**triples())
    embeds = {"text": output.text_embeds, "image": output.image_embeds, "audio": output.audio_embeds}
    losses = []
    for left, right in combinations(embeds, 2):
        scores = model.logit_scale.exp() * embeds[left] @ embeds[right].T
        losses += [F.cross_entropy(scores, torch.arange(3)), F.cross_entropy(scores.T, torch.arange(3))]
        torch.testing.assert_close(output.logits_per_pair[f"{left}-{right}"], scores, rtol=0, atol=ATOL)
    torch.testing.assert_close(output.loss, torch.stack(losses).mean(), rtol=0, atol=ATOL)


def test_the_sigmoid_loss_tells_each_pair_alone():
    model = contrastive("sigmoid")
    assert (model.logit_scale.exp().item(), model.logit_bias.item()) == (pytest.approx(10), -10)
    output = model(**{name: value for name, value in triples().items() if name != "pixel_values"})
    scores = 10 * output.text_embeds @ output.audio_embeds.T - 10
    own = torch.eye(3)
    # Of a row: the chances of the pairs that belong together and of those that do not.
    expected = F.binary_cross_entropy_with_logits(scores, own, reduction="sum") / 3
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=ATOL)
    assert list(output.logits_per_pair) == ["text-audio"]


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_a_contrastive_loss_brings_pairs_together(loss: str):
    model, batch = contrastive(loss).train(), triples()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(20):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for scores in model.eval()(**batch).logits_per_pair.values():
        assert scores.argmax(dim=1).tolist() == scores.argmax(dim=0).tolist() == [0, 1, 2]


def test_an_unknown_contrastive_loss_is_refused():
    with pytest.raises(
        StrictDataclassClassValidationError, match="unknown contrastive_loss 'infonse'; did you mean 'infonce'"
    ):
        ChorusConfig(text_config=TEXT, contrastive_loss="infonse")
    # The configuration ships without the losses, so it names them once more.
    for name in CONTRASTIVE_LOSSES:
        assert ChorusConfig(text_config=TEXT, contrastive_loss=name).contrastive_loss == name


def test_routers_learn_from_each_run_of_the_contrastive_model():
    model, batch = contrastive(router_aux_loss_coef=0.5, router_z_loss_coef=0.25).train(), triples()
    output = model(**batch)
    plain = contrastive(router_aux_loss_coef=0.0, router_z_loss_coef=0.0).train()(**batch)
    routing, banks = output.routing, model.model.language_model.banks
    # Three runs of the sparse layers.
    assert len(routing) == 3 * len(model.config.text_config.sparse_layers)
    expected = plain.loss + 0.5 * balance_loss(routing, banks) + 0.25 * mean_over_banks(routing, z_loss)
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("given", [("input_ids", "attention_mask", "pixel_values"), ("pixel_values", "input_features")])
def test_two_modalities_are_enough(given: tuple[str, ...]):
    batch = triples()
    output = contrastive()(**{name: batch[name] for name in given})
    assert list(output.logits_per_pair) == (["text-image"] if "input_ids" in given else ["image-audio"])
    assert output.loss.isfinite()


def test_an_embedding_does_not_depend_on_its_batch_mates():
    model, batch = contrastive(), triples()
    with torch.no_grad():
        together = model(**batch)
        for row in range(3):
            real = batch["attention_mask"][row].bool()
            text = model.get_text_features(batch["input_ids"][row : row + 1, real])
            image = model.get_image_features(batch["pixel_values"][row : row + 1])
            frames = int(batch["input_features_mask"][row].sum())
            audio = model.get_audio_features(batch["input_features"][row : row + 1, :frames])
            torch.testing.assert_close(text[0], together.text_embeds[row], rtol=0, atol=ATOL)
            torch.testing.assert_close(image[0], together.image_embeds[row], rtol=0, atol=ATOL)
            torch.testing.assert_close(audio[0], together.audio_embeds[row], rtol=0, atol=ATOL)


def test_every_parameter_of_the_contrastive_model_that_sees_a_token_gets_a_gradient():
    model = contrastive().train()
    model(**triples()).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_modalities_with_different_numbers_of_rows_are_an_error():
    batch = triples()
    batch["pixel_values"] = batch["pixel_values"][:2]
    with pytest.raises(ValueError, match="'text': 3, 'image': 2"):
        contrastive()(**batch)


def test_the_contrastive_model_takes_what_the_processor_returns():
    model, batch = contrastive(), triples()
    with torch.no_grad():
        found = model(**batch, mm_token_type_ids=torch.zeros_like(batch["input_ids"]))
        assert torch.equal(found.loss, model(**batch).loss)


@pytest.mark.parametrize("given", [True, False], ids=["modalities given", "modalities found"])
def test_a_placeholder_in_a_contrastive_text_is_refused(given: bool):
    batch = triples()
    batch["input_ids"][1, 2:5] = IMAGE_TOKEN
    if given:
        batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE_TOKEN).long()
    with pytest.raises(ValueError, match="sample 1: 3 tokens of its text stand for an image"):
        contrastive()(**batch)


def test_the_classifier_takes_embeddings_and_positions():
    model = classifier()
    batch = tiny_batch(model.config)
    del batch["labels"]
    positions = torch.arange(24).expand(3, -1)
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(model(**batch, position_ids=positions).logits, expected)
        # Rotary positions tell how far apart words are: at half the distance they say something else.
        assert not torch.allclose(model(**batch, position_ids=positions // 2).logits, expected, atol=1e-6)
        embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
        assert torch.equal(model(**batch, inputs_embeds=embeddings).logits, expected)


def test_a_model_of_dense_layers_alone_trains():
    config = tiny_config(mlp_layer_types=["dense"] * 3)
    model = ChorusForConditionalGeneration(config).train()
    assert torch.isfinite(model(**tiny_batch(config)).loss)


@pytest.mark.parametrize("is_watched", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_an_observer_is_missed_where_routers_learn_and_nothing_watches(is_watched: bool, learns: bool) -> None:
    model = classifier()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(learns or ".router." not in name)
    if is_watched:
        model.model.language_model.register_forward_hook(lambda *_: None)
    assert model._lacks_observer() == (learns and not is_watched)


def test_a_rank_with_half_of_the_heads_adds_its_part_of_the_alignment_loss() -> None:
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(alignment_loss_coef=0.1))
    text = model.config.text_config
    modality_BS = torch.tensor([[0, 0, 1, 1, 0, 3, 3, 0]] * 2)
    layers = set(text.cross_modal_layers)
    shape = (2, text.num_attention_heads // 2, 8, text.head_dim)
    states = [(torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)) for _ in layers]
    of_layers = [
        alignment_loss(*state, modality_BS, None, text.head_dim**-0.5, text.is_causal, text.alignment)
        for state, layer in zip(states, sorted(layers), strict=True)
        if text.layer_types[layer] == "full_attention"
    ]
    found = model._alignment(states, modality_BS, None)
    torch.testing.assert_close(found, torch.stack(of_layers).mean() / 2)
    assert found > 0


@pytest.mark.parametrize("problem", ["regression", None])
def test_only_samples_that_may_leave_are_refused_what_needs_all_layers(problem: str | None) -> None:
    model = classifier(num_hidden_layers=4, exit_layers=[1, 2, 3], exit_loss_coef=1.0)
    model.config.problem_type = problem
    batch = {name: value for name, value in tiny_batch(model.config).items() if name != "labels"}
    asked = {"output_router_logits": True} if problem is None else {}
    # Every exit answers every sample.
    assert len(model(**batch, **asked, output_exit_logits=True).exit_logits) == 3
    model.config.exit_thresholds = [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="while samples leave at exits" if asked else "exit_thresholds compare the"):
        model(**batch, **asked)
