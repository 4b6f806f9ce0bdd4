"""What a plan says of memory against what small runs take, on the CPU.

    python -m benchmarks.plan_memory

Of each case a model trains one step: forward, backward and AdamW. Measured is the most that it holds at a moment:
weights and moments, and what the allocator's trace shows beyond them. `planned_over_measured` is 1 where the plan is
right. `activations_ratio` leaves weights and moments out, which any plan counts right.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.same_bits import AUDIO, AUDIO_TOKEN, IMAGE_TOKEN, TEXT, VISION
from benchmarks.timing import Report, parse, peak_mib
from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.surgery import freeze
from chorus_moe.training.scale.layout import Layout
from chorus_moe.training.scale.plan import Planner, Question
from chorus_moe.training.scale.plan_rates import DEVICES
from chorus_moe.training.sizes import with_lora

SIZES: dict[str, Any] = {
    **{"hidden_size": 128, "num_hidden_layers": 5, "intermediate_size": 256, "moe_intermediate_size": 128},
    **{"vocab_size": 512, "num_key_value_heads": 4},
}


@dataclass(frozen=True)
class Case:
    """One small run.

    Args:
        mix: modality -> share of the tokens, in whole images and clips.
    """

    train: str = "whole"
    checkpointing: bool = False
    sequences: int = 4
    length: int = 256
    media: bool = True
    text: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> ChorusConfig:
        return ChorusConfig(
            text_config=TEXT | SIZES | dict(self.text),
            vision_config=VISION,
            audio_config=AUDIO,
            image_token_id=IMAGE_TOKEN,
            audio_token_id=AUDIO_TOKEN,
        )


CASES = {
    "whole": Case(),
    "whole, checkpointed": Case(checkpointing=True),
    "whole, text": Case(media=False),
    "whole, one long": Case(sequences=1, length=1024),
    "frozen towers": Case(train="frozen_towers"),
    "lora": Case(train="lora"),
    "lora, checkpointed": Case(train="lora", checkpointing=True),
    "windows, own gates": Case(
        text={
            "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
            "sliding_window": 64,
            "expert_banks": {"text": {}, "media": {"modalities": ["image", "audio"], "gate": "own"}, "common": {}},
        }
    ),
}
FRAMES = 80


def make_batch(config: ChorusConfig, case: Case) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Sequences with an image and a clip each, and the mix that a plan is told."""
    torch.manual_seed(0)
    ids = torch.randint(5, config.text_config.vocab_size, (case.sequences, case.length))
    batch, places = {}, {"image": 0, "audio": 0}
    if case.media:
        assert config.vision_config is not None and config.audio_config is not None
        places["image"] = config.vision_config.num_image_tokens
        places["audio"] = config.audio_config.num_audio_tokens(FRAMES)
        ids[:, 2 : 2 + places["image"]] = IMAGE_TOKEN
        ids[:, 2 + places["image"] : 2 + sum(places.values())] = AUDIO_TOKEN
        size = config.vision_config.image_size
        batch["pixel_values"] = torch.randn(case.sequences, 3, size, size)
        batch["input_features"] = torch.randn(case.sequences, FRAMES, config.audio_config.num_mel_bins)
        batch["input_features_mask"] = torch.ones(case.sequences, FRAMES, dtype=torch.long)
    shares = {name: count / case.length for name, count in places.items()}
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(ids < 5, -100)}
    return given | batch, {"text": 1 - sum(shares.values()), **shares}


def planned_and_measured(case: Case) -> dict[str, float]:
    """MiB as planned and as measured, and their ratios."""
    config = case.config
    batch, mix = make_batch(config, case)
    question = Question(
        **{"gpus": 1, "memory": 10**12, "rates": DEVICES["h100"], "sequence_length": case.length, "on_gpu": False},
        **{"batch": case.sequences, "micro_batch": case.sequences, "mix": mix},
        **{"train": case.train, "precision": "float32"},
    )
    planned = Planner(config, question).memory(Layout(), case.checkpointing)
    torch.manual_seed(0)
    model: Any = ChorusForConditionalGeneration(config).train()
    if case.checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if case.train == "frozen_towers":
        freeze(model, "towers")
    if case.train == "lora":
        model = with_lora(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)

    def step() -> None:
        model(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # The first step makes the moments.
    step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *moments]) / 2**20
    beyond = peak_mib(step)
    told = (planned.gradients + planned.activations) / 2**20
    return {
        "planned_mib": planned.total / 2**20,
        "measured_mib": held + beyond,
        "planned_over_measured": planned.total / 2**20 / (held + beyond),
        "activations_ratio": told / beyond,
    }


def planned_over_measured_memory(cases: Mapping[str, Case] = CASES) -> dict[str, float]:
    """Case -> planned bytes over measured ones."""
    return {name: planned_and_measured(case)["planned_over_measured"] for name, case in cases.items()}


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(__doc__ or "", arguments)
    report = Report("Planned memory against measured", parsed)
    for name, case in list(CASES.items())[: 1 if parsed.quick else None]:
        values = planned_and_measured(case)
        report.cases[name] = values
        print(f"{name:<24} | " + " | ".join(f"{key} {value:.3g}" for key, value in values.items()), flush=True)
    report.save()


if __name__ == "__main__":
    main(sys.argv[1:])
