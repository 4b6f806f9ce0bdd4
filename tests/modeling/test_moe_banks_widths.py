"""A token uses the leading share of its experts' width: in every implementation, trained by nested dropout."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import Tensor

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.surgery import parameter_report
from tests.conftest import tiny_batch, tiny_config
from tests.modeling.conftest import make_model

SHARES = [0.25, 0.5, 1.0]
# float32 sums in another order: worst difference of logits seen is 1e-6.
ATOL = 1e-5


@torch.no_grad()
def run(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    return model(**{k: v for k, v in batch.items() if k != "labels"}, **options)


def silenced(model: ChorusForConditionalGeneration, share: float) -> ChorusForConditionalGeneration:
    """The model with zeros in the place of what lies behind the share: what it adds is nothing."""
    for module in model.modules():
        if hasattr(module, "down_proj") and getattr(module.down_proj, "ndim", 0) == 3:
            module.down_proj.data[..., int(share * module.down_proj.shape[-1]) :] = 0
    return model


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm", "cpu_mm"])
@pytest.mark.parametrize("depth", [1, 2])
def test_a_share_is_the_model_without_the_rest(implementation: str, depth: int):
    banks = {"common": {"expert_depth": depth}, "image": {}}
    model = make_model(expert_width_shares=SHARES, expert_banks=banks)
    model.set_experts_implementation(implementation)
    batch = tiny_batch(model.config)
    assert torch.equal(run(model, batch, expert_width_share=1.0).logits, run(model, batch).logits)
    found = {share: run(model, batch, expert_width_share=share).logits for share in SHARES}
    of_each = torch.tensor(SHARES)[torch.randint(3, batch["input_ids"].shape)]
    assert not torch.allclose(found[0.25], found[0.5])
    mixed = run(model, batch, expert_width_share=torch.full_like(of_each, 0.5)).logits
    torch.testing.assert_close(mixed, found[0.5], rtol=0, atol=ATOL)
    expected = run(silenced(model, 0.5), batch).logits
    torch.testing.assert_close(found[0.5], expected, rtol=0, atol=ATOL)


def test_each_token_has_its_own_share_alone_cached_and_in_a_batch():
    model = make_model(expert_width_shares=SHARES)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 128, (2, 12), generator=generator)
    shares = torch.tensor(SHARES)[torch.randint(3, (2, 12), generator=generator)]
    whole = run(model, {"input_ids": ids}, expert_width_share=shares).logits
    alone = run(model, {"input_ids": ids[1:]}, expert_width_share=shares[1:]).logits
    torch.testing.assert_close(alone, whole[1:], rtol=0, atol=ATOL)
    first = run(model, {"input_ids": ids[:, :9]}, expert_width_share=shares[:, :9], use_cache=True)
    cache = first.past_key_values
    rest = run(model, {"input_ids": ids[:, 9:]}, expert_width_share=shares[:, 9:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 9:], rtol=0, atol=ATOL)
    # A token reads nothing of the shares of those behind it.
    other = shares.clone()
    other[:, -1] = 0.25
    moved = run(model, {"input_ids": ids}, expert_width_share=other).logits
    torch.testing.assert_close(moved[:, :-1], whole[:, :-1], rtol=0, atol=ATOL)


def test_training_draws_each_width_unless_one_is_asked_for():
    model = make_model(expert_width_shares=SHARES).train()
    batch = tiny_batch(model.config)
    torch.manual_seed(0)
    drawn = [b.widths for layer in model(**batch, output_router_logits=True).routing for b in layer.values()]
    assert set(torch.cat(drawn).tolist()) == {0, 1, 2}
    model(**batch, expert_width_share=0.25).loss.backward()
    experts = model.model.language_model.layers[1].mlp.banks["common"].experts
    width = experts.down_proj.shape[-1]
    moved = experts.down_proj.grad.abs().sum(dim=(0, 1)) > 0
    assert moved.tolist() == [place < width // 4 for place in range(width)]


def test_checkpointing_draws_the_same_widths_again():
    gradients = []
    for checkpointed in (False, True):
        model = make_model(expert_width_shares=SHARES).train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(**tiny_batch(model.config)).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_what_a_share_saves_is_counted():
    model = make_model(expert_width_shares=SHARES, expert_banks={"common": {}})
    batch = tiny_batch(model.config)
    bank = {share: parameter_report(model, expert_width_share=share).banks["common"] for share in SHARES}
    experts = model.model.language_model.layers[1].mlp.banks["common"].experts
    text = model.config.text_config
    of_token = sum(p.numel() for p in experts.parameters()) * text.num_experts_per_tok / text.num_experts
    layers = len(text.sparse_layers)
    assert bank[1.0]["active"] - bank[0.5]["active"] == layers * of_token / 2
    assert bank[1.0]["total"] == bank[0.25]["total"]
    compute = {share: run(model, batch, output_compute=True, expert_width_share=share).compute for share in SHARES}
    saved = (compute[1.0].flops - compute[0.25].flops) / compute[1.0].experts
    assert saved.tolist() == [0.75 * 6 * text.hidden_size * text.moe_intermediate_size] * 3
    mixed = torch.tensor([[0.25], [1.0], [1.0]]).expand(batch["input_ids"].shape)
    found = run(model, batch, output_compute=True, expert_width_share=mixed).compute.flops
    assert found.tolist() == [compute[0.25].flops[0], *compute[1.0].flops[1:]]


def test_generate_takes_a_share_and_a_model_without_shares_is_as_before(tmp_path: Any):
    model = make_model(expert_width_shares=SHARES)
    ids = torch.randint(5, 128, (1, 6))
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    narrow = model.generate(ids, expert_width_share=0.25, **options)
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.generate(ids, expert_width_share=0.25, **options), narrow)
    plain = make_model()
    plain.load_state_dict(model.state_dict())
    batch = tiny_batch(model.config)
    assert torch.equal(run(plain, batch).logits, run(model, batch).logits)


def test_what_makes_no_sense_is_refused():
    model = make_model(expert_width_shares=SHARES)
    batch = tiny_batch(model.config)
    for share, message in (
        (0.3, r"expert_width_share=0.3 is none of expert_width_shares=\[0.25"),
        (torch.ones(2, 2), r"has shape \(2, 2\)"),
        (torch.full(batch["input_ids"].shape, 0.7), "holds 0.7, none of"),
    ):
        with pytest.raises(ValueError, match=message):
            run(model, batch, expert_width_share=share)
    with pytest.raises(ValueError, match="the model has no expert_width_shares"):
        run(make_model(), batch, expert_width_share=0.5)
    with pytest.raises(ValueError, match="is none of"):
        parameter_report(model, expert_width_share=0.3)
    bank = model.model.language_model.layers[1].mlp.banks["common"]
    bank.experts = torch.nn.Sequential(bank.experts)
    narrow, whole = bank.widths[0], bank.widths[-1]
    with pytest.raises(ValueError, match=f"width {narrow} of {whole} takes experts as they are, with no adapter"):
        bank._narrowed(bank.experts, bank.widths[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"expert_width_shares": [0.5]}, "must rise from above 0 to 1"),
        ({"expert_width_shares": [1.0, 0.5]}, "must rise"),
        ({"expert_width_shares": [0.5, 2.0]}, "must rise"),
        ({"experts_layout": "linear"}, "experts_layout='linear', which runs whole"),
        ({"expert_width_shares": [0.3, 1.0]}, "no whole number"),
    ],
)
def test_shares_that_cannot_be_built_are_refused(text: dict[str, Any], message: str):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**{"expert_width_shares": SHARES} | text)
