"""`generate` gives the same text whatever cache, batch, padding or number of beams computes it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.modeling.modeling_outputs import CACHE
from tests.conftest import AUDIO_TOKEN, IMAGE_TOKEN, tiny_config

Batch = dict[str, Tensor]
NEW_TOKENS = 4
# float32 sums in another order (cached keys, padded rows): worst difference seen over three seeds is 5.4e-7.
ATOL = 5e-6
# Images and clips (frames) of four samples: none, one, several, mixed.
SAMPLES: list[tuple[int, list[int]]] = [(0, []), (1, []), (2, [9, 20]), (1, [13])]


@pytest.fixture(scope="module")
def model() -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config()).eval()
    model.generation_config.eos_token_id = None
    for parameter in model.parameters():  # larger than at the start, so that greedy choices depend on the media
        parameter.data.mul_(1.5)
    return model


def sample_inputs(model: nn.Module, images: int, frames: list[int], seed: int = 0) -> dict[str, Any]:
    """One sample: words, images, words, clips, words."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 128, (4,), generator=generator).tolist()
    for _ in range(images):
        ids += [IMAGE_TOKEN] * model.config.vision_config.num_image_tokens + [9]
    for count in frames:
        ids += [AUDIO_TOKEN] * model.config.audio_config.num_audio_tokens(count) + [11]
    ids += torch.randint(5, 128, (3,), generator=generator).tolist()
    return {
        "input_ids": ids,
        "pixel_values": [torch.randn(3, 32, 32, generator=generator) for _ in range(images)],
        "input_features": [torch.randn(count, 16, generator=generator) for count in frames],
    }


def collate(samples: list[dict[str, Any]], padding: int = 0) -> Batch:
    """A left-padded batch, with `padding` more pad tokens than it needs."""
    length = max(len(sample["input_ids"]) for sample in samples) + padding
    rows = [[0] * (length - len(s["input_ids"])) + s["input_ids"] for s in samples]
    masks = [[0] * (length - len(s["input_ids"])) + [1] * len(s["input_ids"]) for s in samples]
    batch = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
    images = [image for s in samples for image in s["pixel_values"]]
    clips = [clip for s in samples for clip in s["input_features"]]
    if images:
        batch["pixel_values"] = torch.stack(images)
    if clips:
        batch["input_features"] = nn.utils.rnn.pad_sequence(clips, True)
        ones = [torch.ones(len(clip), dtype=torch.long) for clip in clips]
        batch["input_features_mask"] = nn.utils.rnn.pad_sequence(ones, True)
    return batch


def samples_of(model: nn.Module) -> list[dict[str, Any]]:
    return [sample_inputs(model, images, frames, seed) for seed, (images, frames) in enumerate(SAMPLES)]


def generate(model: ChorusForConditionalGeneration, batch: Batch, **options: Any) -> Tensor:
    """The new tokens."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | options
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


@pytest.fixture
def batch(model: ChorusForConditionalGeneration) -> Batch:
    return collate(samples_of(model))


def test_padding_on_the_right_is_refused(model: ChorusForConditionalGeneration, batch: Batch):
    ids, mask = (F.pad(batch[name], (0, 2)) for name in ("input_ids", "attention_mask"))
    with pytest.raises(ValueError, match=r"row 0 ends with padding, .*pad on the left"):
        model.generate(**batch | {"input_ids": ids, "attention_mask": mask}, max_new_tokens=1)


def test_greedy_text_depends_on_the_media(model: ChorusForConditionalGeneration, batch: Batch):
    other = batch | {"pixel_values": batch["pixel_values"].flip(0) * 3}
    assert not torch.equal(generate(model, batch), generate(model, other))


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"attention_mask_free": True},
        {"experts_implementation": "eager"},
    ],
    ids=["no cache", "static cache", "no padding mask given", "eager experts"],
)
def test_greedy_text_is_the_same(model: ChorusForConditionalGeneration, batch: Batch, options: dict[str, Any]):
    if options.pop("attention_mask_free", False):
        single = collate(samples_of(model)[2:3])
        expected = generate(model, single)
        del single["attention_mask"]
        assert torch.equal(generate(model, single), expected)
        return
    experts = options.pop("experts_implementation", None)
    expected = generate(model, batch)
    before = model.config.text_config._experts_implementation
    if experts is not None:
        model.set_experts_implementation(experts)
    found = generate(model, batch, **options)
    model.set_experts_implementation(before)
    assert torch.equal(found, expected)


def test_a_sliding_window_model_generates_the_same_with_every_cache():
    torch.manual_seed(1)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = ChorusForConditionalGeneration(tiny_config(layer_types=kinds, sliding_window=6)).eval()
    model.generation_config.eos_token_id = None
    batch = collate(samples_of(model))
    expected = generate(model, batch, use_cache=False)
    assert torch.equal(generate(model, batch), expected)
    assert torch.equal(generate(model, batch, cache_implementation="static", disable_compile=True), expected)


def test_cached_logits_equal_uncached_logits(model: ChorusForConditionalGeneration, batch: Batch):
    options = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    cached = torch.stack(model.generate(**batch, **options).logits)
    uncached = torch.stack(model.generate(**batch, **options, use_cache=False).logits)
    torch.testing.assert_close(cached, uncached, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("padding", "options"), [(0, {}), (1, {"num_beams": 3}), (16, {})])
def test_a_mixed_batch_gives_each_sample_its_own_text(
    model: ChorusForConditionalGeneration, padding: int, options: dict[str, Any]
):
    samples = samples_of(model)
    together = generate(model, collate(samples, padding), **options)
    alone = torch.cat([generate(model, collate([sample]), **options) for sample in samples])
    assert torch.equal(together, alone)


def test_left_padding_changes_no_logit(model: ChorusForConditionalGeneration):
    sample = samples_of(model)[3]
    with torch.no_grad():
        expected = model(**collate([sample])).logits[:, -1]
        for padding in range(17):
            found = model(**collate([sample], padding)).logits[:, -1]
            torch.testing.assert_close(found, expected, rtol=0, atol=ATOL)


def test_beams_of_several_samples_equal_beams_without_a_cache(model: ChorusForConditionalGeneration, batch: Batch):
    assert torch.equal(generate(model, batch, num_beams=3), generate(model, batch, num_beams=3, use_cache=False))


def test_sampling_repeats_with_its_seed_and_differs_without(model: ChorusForConditionalGeneration, batch: Batch):
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(generate(model, batch, do_sample=True, temperature=2.0))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_several_returned_sequences_belong_to_their_sample(model: ChorusForConditionalGeneration, batch: Batch):
    many = generate(model, batch, num_beams=3, num_return_sequences=2)
    assert many.shape == (2 * len(SAMPLES), NEW_TOKENS)
    assert torch.equal(many[::2], generate(model, batch, num_beams=3))


def test_sampled_sequences_of_one_sample_see_its_own_media(model: ChorusForConditionalGeneration, batch: Batch):
    # top_k=1 makes sampling greedy, so each of the returned sequences must be the greedy text.
    many = generate(model, batch, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(many, generate(model, batch).repeat_interleave(2, dim=0))


def test_encoder_outputs_replace_raw_inputs(model: ChorusForConditionalGeneration, batch: Batch):
    with torch.no_grad():
        encoded = {
            "image": model.get_image_features(batch["pixel_values"]),
            "audio": model.get_audio_features(batch["input_features"], batch["input_features_mask"]),
        }
    bare = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(model(**bare, mm_encoder_outputs=encoded).logits, expected)
    for options in ({}, {"num_beams": 3}, {}):  # the last one: beams must not have changed the caller's outputs
        assert torch.equal(
            generate(model, bare, mm_encoder_outputs=encoded, **options), generate(model, batch, **options)
        )


def test_encoder_outputs_of_one_modality_and_raw_inputs_of_the_other(
    model: ChorusForConditionalGeneration, batch: Batch
):
    with torch.no_grad():
        encoded: dict[str, BaseModelOutputWithPooling] = {"image": model.get_image_features(batch["pixel_values"])}
    bare = {name: value for name, value in batch.items() if name != "pixel_values"}
    assert torch.equal(generate(model, bare, mm_encoder_outputs=encoded), generate(model, batch))
    assert set(encoded) == {"image"}


def test_logits_to_keep_are_the_last_ones(model: ChorusForConditionalGeneration, batch: Batch):
    with torch.no_grad():
        whole, kept = model(**batch).logits, model(**batch, logits_to_keep=3).logits
    # One matrix product over fewer rows: the difference seen over four seeds is 0.
    torch.testing.assert_close(kept, whole[:, -3:], rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}],
    ids=["greedy", "beams", "no cache", "static cache"],
)
def test_each_encoder_runs_exactly_once(model: ChorusForConditionalGeneration, batch: Batch, options: dict[str, Any]):
    calls = []
    towers = (model.model.vision_tower, model.model.audio_tower)
    hooks = [tower.register_forward_hook(lambda module, *_: calls.append(type(module).__name__)) for tower in towers]
    generate(model, batch, **options)
    for hook in hooks:
        hook.remove()
    assert sorted(calls) == ["ChorusAudioModel", "ChorusVisionModel"]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 2}])
def test_placeholders_are_never_generated(model: ChorusForConditionalGeneration, batch: Batch, options: dict[str, Any]):
    weight = model.lm_head.weight.data.clone()
    # A head whose largest scores are the placeholders'.
    model.lm_head.weight.data[[IMAGE_TOKEN, AUDIO_TOKEN]] = 100 * weight[[7, 8]]
    found = generate(model, batch, **options)
    model.lm_head.weight.data = weight
    assert not ((found == IMAGE_TOKEN) | (found == AUDIO_TOKEN)).any()


def test_modalities_are_known_to_every_step_of_generate(model: ChorusForConditionalGeneration, batch: Batch):
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["mm_token_type_ids"]), with_kwargs=True
    )
    generate(model, batch)
    hook.remove()
    assert torch.equal(seen[0], model.model.modality_ids(batch["input_ids"]))
    assert all(not ids.any() for ids in seen[1:])


@pytest.mark.parametrize("static", [False, True])
def test_a_second_turn_with_a_new_image_reuses_the_cache(model: ChorusForConditionalGeneration, static: bool):
    from transformers import StaticCache

    first, second = sample_inputs(model, 1, [9], seed=5), sample_inputs(model, 1, [14], seed=6)
    cache = StaticCache(model.config, max_cache_len=96) if static else DynamicCache(config=model.config)
    turn = model.generate(**collate([first]), max_new_tokens=4, do_sample=False, **{CACHE: cache}, disable_compile=True)
    conversation = turn[0].tolist() + second["input_ids"]
    whole = collate([{key: first[key] + second[key] for key in first} | {"input_ids": conversation}])
    new = collate([second]) | {"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"]}
    new["mm_token_type_ids"] = model.model.modality_ids(whole["input_ids"])
    reused = generate(model, new, **{CACHE: cache}, disable_compile=True)
    assert torch.equal(reused, generate(model, whole))


@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("text", [{}, {"sliding_window": 4, "layer_types": ["sliding_attention"] * 3}])
def test_packed_sequences_do_not_see_each_other(use_cache: bool | None, text: dict[str, Any]):
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(**text)).eval()
    ids = torch.randint(5, 128, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = model(input_ids=ids).logits
        positions = torch.arange(10).repeat(2)[None]
        packed = model(input_ids=ids.view(1, 20), position_ids=positions, use_cache=use_cache)
        whole = model(input_ids=ids, position_ids=torch.arange(10)[None], use_cache=True)
    # float32 sums in another order, at logits of size 1.
    torch.testing.assert_close(packed.logits.view(2, 10, -1), apart, rtol=0, atol=1e-5)
    assert packed.past_key_values is None
    assert whole.past_key_values.get_seq_length() == 10


def test_generate_refuses_prompts_that_hold_the_answer(model: ChorusForConditionalGeneration, batch: Batch):
    with pytest.raises(ValueError, match="the prompt holds the answer"):
        model.generate(**batch, labels=batch["input_ids"], max_new_tokens=2)


@torch.no_grad()
def test_a_model_whose_exits_nobody_is_sure_enough_to_take_answers_as_without_them() -> None:
    torch.manual_seed(0)
    exiting = ChorusForConditionalGeneration(tiny_config(exit_layers=[1])).eval()
    exiting.generation_config.eos_token_id = None
    batch = collate([sample_inputs(exiting, 1, [9])])
    whole = exiting.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert torch.equal(
        exiting.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS, exit_confidence=1.0), whole
    )


@pytest.mark.parametrize("seen", [0, 4])
def test_a_step_gets_the_scores_of_the_tokens_that_it_feeds(seen: int) -> None:
    model = ChorusForConditionalGeneration(tiny_config()).eval()
    ids, scores = torch.full((1, 6), 7), torch.linspace(0, 0.5, 6)[None]
    cache = DynamicCache(config=model.config.text_config)
    if seen:
        model(input_ids=ids[:, :seen], use_cache=True, **{CACHE: cache})
    for more in (0, 2):  # tokens that were generated have no score
        longer = torch.cat((ids, torch.full((1, more), 8)), dim=1)
        fed = longer.shape[1] - seen
        given = {"complexity_scores": scores, CACHE: cache, "attention_mask": torch.ones_like(longer)}
        found = model.prepare_inputs_for_generation(longer, next_sequence_length=fed, use_cache=True, **given)
        assert found["input_ids"].shape[1] == fed
        expected = torch.cat((scores, torch.full((1, more), torch.nan)), dim=1)[:, seen:]
        torch.testing.assert_close(found["complexity_scores"], expected, rtol=0, atol=0, equal_nan=True)


def test_labels_are_watched_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ChorusForConditionalGeneration(tiny_config())
    seen: list[Any] = []
    monkeypatch.setitem(SERVICES, "watch_labels", lambda *given: seen.append(given[1:]))
    ids = torch.tensor([[5, 6, 7]])
    for mode in (False, True):
        model.train(mode)
        model(input_ids=ids)
        model(input_ids=ids, labels=ids)
    ((input_ids, embeds, _, labels),) = seen
    assert input_ids is labels is ids and embeds is None
