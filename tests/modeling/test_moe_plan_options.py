"""Options of one call: complexity, budgets and sampled banks, in `forward` and in `generate`."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from chorus_moe import ChorusForConditionalGeneration, ChorusForSequenceClassification
from chorus_moe.modeling.moe_plan import ForwardPlan, RoutingOptions
from tests.conftest import tiny_batch, tiny_config

ADAPTIVE = {"text": {"adaptive_experts": True}, "image": {}, "common": {"adaptive_experts": True}}


def make(**text: Any) -> ChorusForConditionalGeneration:
    torch.manual_seed(0)
    return ChorusForConditionalGeneration(tiny_config(**text)).eval()


def used(model: Any, **inputs: Any) -> list[dict[str, Tensor]]:
    """By layer and bank: how many experts each row visits."""
    with torch.no_grad():
        layers = model(**inputs, output_router_logits=True).routing
    return [
        {name: (bank.selected_experts < bank.router_logits.shape[1]).sum(dim=-1) for name, bank in layer.items()}
        for layer in layers
    ]


def test_a_budget_holds_for_its_modality_in_every_bank():
    model, batch = make(), tiny_batch(tiny_config())
    kinds = batch["mm_token_type_ids"].flatten()
    for layer in used(model, **batch, expert_budget={"image": 1}):
        assert layer["image"].tolist() == [1] * len(layer["image"])
        assert layer["text"].tolist() == [2] * len(layer["text"])
        assert torch.equal(layer["common"], torch.where(kinds == 1, 1, 2))


def test_a_budget_changes_from_call_to_call_and_leaves_nothing_behind():
    model, batch = make(), tiny_batch(tiny_config())
    with torch.no_grad():
        plain = model(**batch).logits
        cut = model(**batch, expert_budget={"text": 1, "image": 1, "audio": 1}).logits
        assert torch.equal(model(**batch).logits, plain)
        assert torch.equal(model(**batch, expert_budget={"text": 2, "image": 9}).logits, plain)
    assert not torch.allclose(cut, plain, atol=1e-3)


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm", "cpu_mm"])
def test_every_implementation_skips_what_the_budget_leaves_out(experts: str):
    batch = tiny_batch(tiny_config())
    logits = []
    for name in ("eager", experts):
        model = make()
        model.set_experts_implementation(name)
        with torch.no_grad():
            logits.append(model(**batch, expert_budget={"text": 1, "image": 2}).logits)
    # float32 sums in another order, at logits of size 1.
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("experts", ["batched_mm", "grouped_mm", "cpu_mm"])
def test_adapters_around_the_experts_leave_out_what_the_budget_does(experts: str):
    batch = tiny_batch(tiny_config())
    results = []
    for name in ("eager", experts):
        model = make()
        model.set_experts_implementation(name)
        torch.manual_seed(1)
        options = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "init_lora_weights": False}
        adapted = get_peft_model(model, LoraConfig(r=2, **options))
        output = adapted(**batch, expert_budget={"text": 1, "image": 1, "audio": 1})
        output.loss.backward()
        results.append([output.logits] + [p.grad for p in adapted.parameters() if p.requires_grad])
    for expected, found in zip(*results, strict=True):
        # float32 sums in another order: worst seen over four seeds is 2.4e-6 of a tensor's largest value.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(float(expected.detach().abs().max()), 1e-3))


def test_half_the_budget_is_half_the_products():
    model = make()
    model.set_experts_implementation("eager")
    mlp = model.model.language_model.layers[1].mlp
    hidden = torch.randn(1, 50, 64)
    flops = []
    for budget in (2, 1):
        options = RoutingOptions(None, {"text": budget}, frozenset(), None, {})
        plan = ForwardPlan.build(torch.zeros(1, 50, dtype=torch.long), None, options)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            mlp(hidden, plan)
        flops.append(counter.get_total_flops())
    expert = 50 * 3 * 2 * 64 * 32  # fifty tokens through one expert; two banks are open to text
    assert flops[0] - flops[1] == 2 * expert


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_budget": {"imgae": 1}}, "expert_budget: unknown modality 'imgae'; did you mean 'image'"),
        ({"expert_budget": {"image": 0}}, r"expert_budget\['image'\]=0 must be a whole number of at least 1"),
        ({"expert_budget": {"image": 1.5}}, r"expert_budget\['image'\]=1.5 must be a whole number"),
        ({"complexity_scores": torch.zeros(3, 23)}, r"shape \(3, 23\), the tokens have \(3, 24\)"),
        ({"complexity_scores": torch.full((3, 24), 1.5)}, "lie between 1.5 and 1.5; they must lie between 0 and 1"),
        ({"sample_experts": ("txet",)}, "sample_experts: unknown bank 'txet'; did you mean 'text'"),
        ({"sample_experts": "text"}, "sample_experts='text' is a string"),
    ],
)
def test_an_option_that_does_not_fit_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(expert_banks=ADAPTIVE)(**tiny_batch(tiny_config()), **options)


def test_complexity_without_an_adaptive_bank_is_refused():
    with pytest.raises(ValueError, match="complexity_scores changes nothing: no bank of"):
        make()(**tiny_batch(tiny_config()), complexity_scores=torch.zeros(3, 24))


@pytest.mark.parametrize(
    ("bank", "message"),
    [
        ({"balance": "bias"}, "names 'text', which has balance='bias'"),
        ({"expert_capacity": 1.0, "capacity_in_eval": True}, "names 'text', which limits the capacity"),
    ],
)
def test_a_draw_of_unknown_probability_is_refused(bank: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make(expert_banks={"text": bank, "common": {}})(input_ids=torch.full((1, 4), 7), sample_experts=("text",))


def test_complexity_sets_the_number_of_experts_of_each_token():
    model, batch = make(expert_banks=ADAPTIVE), tiny_batch(tiny_config())
    scores = torch.rand(3, 24, generator=torch.Generator().manual_seed(0))
    rows = (batch["mm_token_type_ids"].eq(0) & batch["attention_mask"].bool()).flatten()
    wanted = (scores.flatten() * 2).ceil().clamp(1, 2).long()
    for layer in used(model, **batch, complexity_scores=scores):
        assert torch.equal(layer["common"], wanted)
        assert torch.equal(layer["text"], wanted[rows])
        assert layer["image"].tolist() == [2] * len(layer["image"])


def test_a_budget_caps_what_complexity_asks_for():
    model, batch = make(expert_banks=ADAPTIVE), tiny_batch(tiny_config())
    options = {"complexity_scores": torch.ones(3, 24), "expert_budget": {"text": 1}}
    assert used(model, **batch, **options)[0]["text"].max() == 1


def test_adaptive_experts_are_those_of_the_cached_step():
    model = make(expert_banks=ADAPTIVE)
    ids = torch.randint(5, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        cache = model(input_ids=ids[:, :8], use_cache=True).past_key_values
        step = model(input_ids=ids[:, 8:], past_key_values=cache).logits[:, -1]
    # float32 sums in another order (cached keys), at logits of size 1.
    torch.testing.assert_close(step, whole, rtol=0, atol=5e-6)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_uses_complexity_for_the_prompt_and_entropy_afterwards(use_cache: bool, num_beams: int):
    model = make(expert_banks=ADAPTIVE)
    ids = torch.randint(5, 128, (2, 6), generator=torch.Generator().manual_seed(0))
    seen: list[list[float]] = []

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append([round(x, 2) for x in kwargs["complexity_scores"][0].tolist()])

    model.model.language_model.register_forward_pre_hook(spy, with_kwargs=True)
    scores = torch.arange(1, 7)[None].expand(2, 6) / 10
    model.generate(
        ids,
        complexity_scores=scores,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        num_beams=num_beams,
        use_cache=use_cache,
    )
    prompt = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert seen[0] == prompt
    if use_cache:
        assert [len(step) for step in seen[1:]] == [1] * len(seen[1:])
    else:
        assert seen[1][:6] == prompt
    assert all(step[-1] != step[-1] for step in seen[1:])


def test_generate_takes_a_budget_for_all_its_steps():
    model, seen = make(), []
    ids = torch.randint(5, 128, (1, 6), generator=torch.Generator().manual_seed(0))
    bank = model.model.language_model.layers[1].mlp.banks["text"]
    bank.experts.register_forward_pre_hook(lambda module, args: seen.append(int((args[1] < 4).sum(dim=-1).max())))
    model.generate(ids, expert_budget={"text": 1}, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    model.generate(ids, expert_budget={"text": 2}, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert seen == [1] * 3 + [2] * 3


def test_other_heads_take_the_options():
    torch.manual_seed(0)
    model = ChorusForSequenceClassification(tiny_config()).eval()
    batch = tiny_batch(model.config)
    del batch["labels"]
    assert used(model, **batch, expert_budget={"text": 1})[0]["text"].max() == 1


def test_sampled_banks_alone_are_drawn_and_return_their_probability():
    model, batch = make(), tiny_batch(tiny_config())
    torch.manual_seed(3)
    with torch.no_grad():
        plain, drawn = (model(**batch, output_router_logits=True, sample_experts=s) for s in (None, ("text",)))
    first, second = plain.routing[0], drawn.routing[0]
    assert torch.equal(first["image"].selected_experts, second["image"].selected_experts)
    assert not torch.equal(first["text"].selected_experts, second["text"].selected_experts)
    assert second["image"].log_probs is None
    assert second["text"].log_probs.shape == (len(second["text"].rows),)
    assert (second["text"].log_probs < 0).all()


def test_the_gradient_of_a_draw_reaches_its_router_and_the_draw_survives_checkpointing():
    gradients, draws = [], []
    for checkpointing in (False, True):
        model = make().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        routers = [layer.mlp.banks["text"].router for layer in model.model.language_model.layers[1:]]
        recorded: list[Tensor] = []
        for module in routers:
            module.register_forward_hook(lambda m, a, output, r=recorded: r.append(output.selected_experts))
        torch.manual_seed(7)
        output = model(**tiny_batch(model.config), sample_experts=("text",))
        reward = sum(layer["text"].log_probs.mean() for layer in output.routing)
        (output.loss + reward).backward()
        gradients.append([module.weight.grad for module in routers])
        draws.append(recorded)
    assert len(draws[1]) == 2 * len(draws[0]) == 4
    # Layers are recomputed last to first, each with the draw of its first run.
    order = [0, 1, 1, 0]
    assert all(torch.equal(draw, draws[0][place]) for draw, place in zip(draws[1], order, strict=True))
    for first, second in zip(*gradients, strict=True):
        assert first.abs().sum() > 0
        # The same operations; sums over a parameter's uses may change places.
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-7)


def test_rows_tell_the_modality_of_every_decision():
    model, batch = make(), tiny_batch(tiny_config())
    with torch.no_grad():
        layer = model(**batch, output_router_logits=True).routing[0]
    kinds = batch["mm_token_type_ids"].flatten()
    assert layer["common"].rows is None
    assert (kinds[layer["audio"].rows] == 3).all()
    assert len(layer["audio"].rows) == len(layer["audio"].router_logits) > 0
