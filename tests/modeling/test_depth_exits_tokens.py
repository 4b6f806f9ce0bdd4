"""Tokens that leave at exits while `generate` decodes: against a decoder that computes the whole text at every step."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.depth_exits import confidence
from tests.modeling.conftest import make_model
from tests.modeling.test_modeling_generation import collate, sample_inputs

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "windows": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 6,
        "num_global_tokens": 2,
    },
    "deep experts": {"expert_banks": {"text": {"expert_depth": 2}, "common": {}}},
    "skipped layers": {"skip_budget": 0.3},
}
NEW_TOKENS = 10


def decoder(**text: Any) -> ChorusForConditionalGeneration:
    """With exits after the first and the second of three layers, and answers of which some are sure."""
    model = make_model(exit_layers=[1, 2], **text)
    model.lm_head.weight.data.mul_(4.0)
    return model


def prompts(model: Any) -> list[dict[str, Tensor]]:
    return [collate([sample_inputs(model, images, clips)], 0) for images, clips in ((1, [9]), (0, [7]), (1, []))]


def generate(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    length = batch["input_ids"].shape[1]
    return model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS, **options)[:, length:]


def seen_exits(model: Any) -> list[Tensor]:
    """`left_after` of every decoding step from now on."""
    found: list[Tensor] = []
    model.register_forward_hook(
        lambda _, args, output: found.append(output.left_after) if output.left_after is not None else None
    )
    return found


def note(states: dict[int, Tensor], layer: int, module: nn.Module, args: Any, output: Tensor) -> None:
    states[layer] = output


@torch.no_grad()
def slow_text(model: Any, batch: dict[str, Tensor], threshold: float) -> tuple[list[int], list[int]]:
    """The text and after how many layers each token but the first left, without any cache: each step runs the whole
    text, and tokens that had left after some layers keep their states from there on."""
    language = model.model.language_model
    prompt = batch["input_ids"].shape[1]
    left: list[int] = []  # of the generated tokens that have been fed, in order
    text: list[int] = []

    def freeze(number: int, length: int) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            depth_S = torch.tensor([3] * prompt + left + [3] * (length - prompt - len(left)))
            return torch.where((depth_S < number)[None, :, None], args[0], output)

        return hook

    while len(text) < NEW_TOKENS:
        ids = torch.cat((batch["input_ids"], torch.tensor([text], dtype=torch.long)), dim=1)
        hooks = [layer.register_forward_hook(freeze(i, ids.shape[1])) for i, layer in enumerate(language.layers, 1)]
        states: dict[int, Tensor] = {}
        hooks += [layer.register_forward_hook(partial(note, states, i)) for i, layer in enumerate(language.layers)]
        inputs = batch | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = model(**inputs, use_cache=False).logits[:, -1]
        for hook in hooks:
            hook.remove()
        if text:  # the prompt runs through all layers
            answers = [model.lm_head(language.norm(state[:, -1])) for state in states.values()]
            exits = [i for i in (0, 1) if confidence(answers[i]).item() > threshold]
            left.append(exits[0] + 1 if exits else 3)
            logits = answers[exits[0]] if exits else logits
        text.append(int(logits.argmax()))
    return text, left


@pytest.mark.parametrize("quantile", [0.3, 0.7])
@pytest.mark.parametrize("case", CASES)
def test_text_and_depth_are_those_of_a_decoder_without_a_cache(case: str, quantile: float):
    model = decoder(**CASES[case])
    batch = prompts(model)[0]
    outputs = model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)
    with torch.no_grad():
        whole = model(**batch | {"input_ids": outputs.sequences, "attention_mask": None}, output_hidden_states=True)
        sure = confidence(model.lm_head(model.model.language_model.norm(whole.hidden_states[1][0, -NEW_TOKENS:])))
    threshold = sure.quantile(quantile).item()
    text, left = slow_text(model, batch, threshold)
    found = seen_exits(model)
    assert generate(model, batch, exit_confidence=threshold)[0].tolist() == text
    assert torch.cat(found).tolist() == left
    assert len(set(left)) > 1  # some leave early and some late


@pytest.mark.parametrize("case", CASES)
def test_a_sample_leaves_in_a_batch_as_it_leaves_alone(case: str):
    model = decoder(**CASES[case])
    samples = [sample_inputs(model, images, clips) for images, clips in ((1, [9]), (0, [7]), (1, []))]
    found, seen = seen_exits(model), set()
    for threshold in (0.15, 0.3):
        alone, depths = [], []
        for sample in samples:
            alone.append(generate(model, collate([sample], 0), exit_confidence=threshold)[0])
            depths.append(torch.cat(found).tolist())
            found.clear()
        together = generate(model, collate(samples, 2), exit_confidence=threshold)
        assert torch.equal(together, torch.stack(alone))
        assert torch.stack(found, dim=1).tolist() == depths
        found.clear()
        seen |= {depth for of_sample in depths for depth in of_sample}
    assert len(seen) > 1


def test_nothing_changes_where_nobody_is_sure_and_all_leave_where_anything_will_do():
    model = decoder()
    batch, found = prompts(model)[0], seen_exits(model)
    assert torch.equal(generate(model, batch, exit_confidence=1.0), generate(model, batch))
    assert torch.cat(found).tolist() == [3] * (NEW_TOKENS - 1)
    found.clear()
    generate(model, batch, exit_confidence=0.0)
    assert torch.cat(found).tolist() == [1] * (NEW_TOKENS - 1)


def test_layers_above_an_exit_project_keys_and_values_and_nothing_else():
    model = decoder()
    calls: dict[str, int] = {}
    for name, module in model.model.language_model.layers[2].named_modules():
        if isinstance(module, nn.Linear) or name.endswith("mlp"):
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    generate(model, prompts(model)[0], exit_confidence=0.0)
    steps = NEW_TOKENS - 1
    assert calls["self_attn.k_proj.text"] == calls["self_attn.v_proj.text"] == steps + 1
    assert calls["mlp"] == calls["self_attn.q_proj"] == calls["self_attn.o_proj"] == 1  # of the prompt


def test_the_confidence_is_saved_with_the_generation_settings(tmp_path: Path):
    model = decoder()
    model.generation_config.exit_confidence = 0.05
    model.save_pretrained(tmp_path)
    loaded = ChorusForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch, found = prompts(model)[0], seen_exits(loaded)
    assert torch.equal(generate(loaded, batch), generate(model, batch, exit_confidence=0.05))
    assert len(found) == NEW_TOKENS - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_confidence": 1.5}, r"exit_confidence=1.5 is outside 0\.\.1"),
        ({"exit_confidence": 0.9, "use_cache": False}, "exit_confidence=0.9 saves what a cache keeps"),
        ({"exit_confidence": 0.9, "assistant_early_exit": 1}, "exit_confidence=0.9 and assistant_early_exit=1"),
        (
            {"exit_confidence": 0.9, "output_hidden_states": True, "return_dict_in_generate": True},
            "output_hidden_states=True while tokens leave",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(options: dict[str, Any], message: str):
    model = decoder()
    with pytest.raises(ValueError, match=message):
        generate(model, prompts(model)[0], **options)


def test_a_model_without_exits_and_a_training_step_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="exit_confidence=0.9 changes nothing: the model has no exit_layers"):
        generate(model, prompts(model)[0], exit_confidence=0.9)
    model = decoder().train()
    with pytest.raises(ValueError, match="exit_confidence=0.9 is for decoding"):
        model(**prompts(model)[0], exit_confidence=0.9)
