"""`torch.export` of every part against the model, at sizes that it was not traced with."""

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration, ChorusForContrastive, ChorusForSequenceClassification
from chorus_moe.modeling.moe_selection import MANY_CHOICES, best_experts
from chorus_moe.serving.exporting.parts import DECODER, EMBED_TOKENS, check_exportable, parts_of
from chorus_moe.serving.exporting.programs import export_programs
from chorus_moe.surgery import unfuse_experts
from tests.conftest import tiny_batch, tiny_config

# One sparse layer with all banks, whose tracing takes the time.
TEXT = {"num_hidden_layers": 1, "mlp_layer_types": ["sparse"], "cross_modal_layers": [0]}
# float32 sums in another order, at logits below 1.
ATOL = 1e-5


@pytest.fixture(scope="module")
def model() -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config(**TEXT)).eval()


@torch.no_grad()
def test_graphs_hold_for_every_size_and_with_the_cache_they_return(model: ChorusForConditionalGeneration) -> None:
    # Unchecked: torch guards against a cache of no tokens, where a slice of the mask is the whole mask.
    programs = {name: program.module(check_guards=False) for name, program in export_programs(model).items()}
    assert list(programs) == [EMBED_TOKENS, "image_encoder", "audio_encoder", DECODER]
    batch = tiny_batch(model.config)
    del batch["labels"]
    expected = model(**batch).logits[:, -1:]

    embeds = programs[EMBED_TOKENS](batch["input_ids"])
    image = programs["image_encoder"](batch["pixel_values"])
    audio, kept = programs["audio_encoder"](batch["input_features"], batch["input_features_mask"])
    places = batch["mm_token_type_ids"][..., None]
    embeds = embeds.masked_scatter(places == 1, image).masked_scatter(places == 3, audio[kept])
    text = model.config.text_config
    cache = [torch.zeros(3, text.num_key_value_heads, 0, text.head_dim)] * 2
    positions = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    # A first piece of many tokens without a cache, then one token behind it.
    inputs = (embeds, batch["mm_token_type_ids"], positions)
    _, *cache = programs[DECODER](
        inputs[0][:, :-1], batch["attention_mask"][:, :-1], inputs[1][:, :-1], inputs[2][:, :-1], *cache
    )
    found, *_ = programs[DECODER](
        inputs[0][:, -1:], batch["attention_mask"], inputs[1][:, -1:], inputs[2][:, -1:], *cache
    )
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


@torch.no_grad()
def test_whole_sequences_become_the_logits_or_the_unit_vectors_of_their_model() -> None:
    """The modules that are traced, run plainly."""
    torch.manual_seed(0)
    ids, mask = torch.randint(5, 50, (2, 6)), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    classifier = ChorusForSequenceClassification(tiny_config(num_labels=3, **TEXT)).eval()
    parts = {part.name: part.module for part in parts_of(classifier)}
    found = parts[DECODER](parts[EMBED_TOKENS](ids), mask, torch.zeros_like(ids))
    torch.testing.assert_close(found, classifier(input_ids=ids, attention_mask=mask).logits, atol=ATOL, rtol=0)

    contrastive = ChorusForContrastive(tiny_config(**TEXT)).eval()
    parts = {part.name: part.module for part in parts_of(contrastive)}
    found = parts[f"text_{DECODER}"](parts[EMBED_TOKENS](ids), mask)
    torch.testing.assert_close(found, contrastive.get_text_features(ids, mask), atol=ATOL, rtol=0)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2))
    pixels = tiny_batch(contrastive.config)["pixel_values"]
    tokens = parts["image_encoder"](pixels)
    image = parts[f"image_{DECODER}"](tokens, torch.ones(tokens.shape[:2], dtype=torch.long))
    torch.testing.assert_close(image, contrastive.get_image_features(pixels), atol=ATOL, rtol=0)


def test_what_no_graph_can_hold_is_refused_with_what_to_do() -> None:
    torch.manual_seed(0)
    banks = {"common": {"expert_capacity": 4, "capacity_in_eval": True}}
    with pytest.raises(ValueError, match=r"banks \['common'\].*leave capacity_in_eval out"):
        check_exportable(ChorusForConditionalGeneration(tiny_config(expert_banks=banks)))
    classifier = ChorusForSequenceClassification(tiny_config(exit_layers=[1]))
    check_exportable(classifier)
    classifier.config.exit_thresholds = [0.9]
    with pytest.raises(ValueError, match="exit_thresholds = None"):
        check_exportable(classifier)
    contrastive = ChorusForContrastive(tiny_config())
    unfuse_experts(contrastive)
    with pytest.raises(ValueError, match=r"fuse_experts\(model\)"):
        check_exportable(contrastive)
    with pytest.raises(ValueError, match="float"):
        check_exportable(ChorusForConditionalGeneration(tiny_config()).bfloat16())
    with pytest.raises(ValueError, match="ChorusModel"):
        check_exportable(contrastive.model)


def test_many_experts_of_a_token_are_chosen_without_a_sort() -> None:
    class Choice(torch.nn.Module):
        def forward(self, scores: torch.Tensor) -> torch.Tensor:
            return best_experts(scores, MANY_CHOICES + 1)

    # Small whole numbers, so that many tie.
    scores = torch.randint(4, (200, 16), generator=torch.Generator().manual_seed(0)).float()
    program = torch.export.export(Choice(), (scores,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    assert not [node for node in program.graph.nodes if "sort" in str(node.target)]
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, : MANY_CHOICES + 1]
    assert torch.equal(program.module()(scores), expected)
