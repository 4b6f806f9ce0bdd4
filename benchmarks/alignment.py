"""Alignment of text and images in cross-modal attention: do the maps stay sharp, and does it help?

Run as `python -m benchmarks.alignment`. An image shows four handwritten digits, a caption names what stands where, in
any order, with one digit left out; a classifier without causality names it. Digits of other writers test it. Arms:
`chorus` without the loss, then each kind of `alignment_loss`. `maps` is the first kind that was built. In a second part
the image stands before the caption in a causal model, which takes `contrastive` and, for comparison, `maps`. Rows:

- `accuracy` of the missing digit;
- `distance`: Jensen-Shannon divergence of the text's map of the image and the image's map of the text (0 to .69);
- `entropy` of the text's map, as a share of the largest;
- `on_place`: the share of the attention of a place's word that falls on this place (chance .25);
- `retrieval`: how often a caption looks most at its own image among those of 32 samples (chance .03).
"""

import argparse
import math
from collections.abc import Mapping
from statistics import fmean, pstdev

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.digit_lessons import stepper
from benchmarks.timing import OURS, Report, parse
from chorus_moe import ChorusConfig, ChorusForSequenceClassification
from chorus_moe.modeling.configuration_text import ALIGNMENTS
from chorus_moe.modeling.losses import alignment_loss, pair_scores

IMAGE, UNKNOWN, FIRST_PLACE, FIRST_DIGIT, FIRST_FILLER, VOCABULARY = 3, 4, 5, 10, 20, 24
PLACES, DIGITS, SIDE = 4, 4, 4  # of the image; of its classes; image tokens in a row
BATCH, TEST = 32, 256
UNITS = ("accuracy", "distance", "entropy", "on_place", "retrieval")


def pictures() -> tuple[list[Tensor], list[Tensor]]:
    """Digit -> pictures `(N, 8, 8)` to learn from, and those of other writers: the set is ordered by writers."""
    data = load_digits(n_class=DIGITS)
    images, labels = torch.tensor(data.images, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    cut = len(images) * 2 // 3
    return tuple(
        [part[of_part == d] for d in range(DIGITS)]
        for part, of_part in (  # type: ignore[return-value]
            (images[:cut], labels[:cut]),
            (images[cut:], labels[cut:]),
        )
    )


def batch_of(count: int, found: list[Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Images `(B, 3, 16, 16)` of four digits, captions `place digit` for each in any order, and the missing digit."""
    digits_BP = torch.randint(DIGITS, (count, PLACES), generator=generator)
    order_BP = torch.rand(count, PLACES, generator=generator).argsort(dim=1)
    image = torch.empty(count, 16, 16)
    for sample, digits in enumerate(digits_BP.tolist()):
        for place, digit in enumerate(digits):
            chosen = found[digit][int(torch.randint(len(found[digit]), (1,), generator=generator))]
            row, column = divmod(place, 2)
            image[sample, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = chosen
    named_BP = digits_BP.gather(1, order_BP) + FIRST_DIGIT
    labels = named_BP[:, -1] - FIRST_DIGIT
    named_BP[:, -1] = UNKNOWN
    caption = torch.stack((order_BP + FIRST_PLACE, named_BP), dim=2).flatten(1)
    ids = torch.cat((torch.full((count, SIDE * SIDE), IMAGE), caption), dim=1)
    return {"input_ids": ids, "pixel_values": image[:, None].expand(-1, 3, -1, -1), "labels": labels}


def classifier(seed: int, coefficient: float, is_causal: bool, kind: str | None) -> ChorusForSequenceClassification:
    torch.manual_seed(seed)
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_layer_types": ["dense", "dense"],
        "expert_banks": {"common": {}},
        "cross_modal_layers": [1],
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "modalities": ["text", "image"],
        "is_causal": is_causal,
        "alignment": kind,
        "alignment_loss_coef": coefficient,
    }
    vision = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"img_size": 16, "patch_size": 16 // SIDE, "embed_dim": 48, "depth": 1, "num_heads": 4},
        "image_size": 16,
        "pool_size": 1,
    }
    config = ChorusConfig(text_config=text, vision_config=vision, audio_config=None, image_token_id=IMAGE)
    config.num_labels = DIGITS
    return ChorusForSequenceClassification(config)


@torch.no_grad()
def scores(model: ChorusForSequenceClassification, batch: Mapping[str, Tensor], is_causal: bool) -> dict[str, float]:
    """What the module's docstring names, of the last layer's maps."""
    model.eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    right = model(**inputs).logits.argmax(dim=-1) == batch["labels"]
    ids, scaling = batch["input_ids"], model.config.text_config.head_dim**-0.5
    modality = (ids == IMAGE).long()
    query, key = model.model(**inputs, output_cross_modal_states=True).cross_modal_states[-1]
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    image_tokens = SIDE * SIDE
    map_BHQP = (query[:, :, image_tokens:] @ keys[:, :, :image_tokens].transpose(2, 3) * scaling).softmax(dim=-1)
    entropy = torch.special.entr(map_BHQP).sum(dim=-1).mean().item() / math.log(image_tokens)
    # The place of each image token, row by row, and of the word for a place.
    row, column = torch.arange(image_tokens) // SIDE, torch.arange(image_tokens) % SIDE
    place_P = 2 * (row // (SIDE // 2)) + column // (SIDE // 2)
    named_BQ = ids[:, image_tokens::2] - FIRST_PLACE
    on_place = (map_BHQP[:, :, ::2] * (place_P == named_BQ[..., None])[:, None]).sum(dim=-1).mean().item()
    found = []
    for start in range(0, len(ids), BATCH):
        part = slice(start, start + BATCH)
        looks = pair_scores(query[part], keys[part], modality[part] == 0, modality[part] == 1, scaling).mean(dim=1)
        found.append((looks.argmax(dim=1) == torch.arange(len(looks))).float().mean().item())
    distance = alignment_loss(query, key, modality, None, scaling, is_causal, "maps").item()
    values = (right.float().mean().item(), distance, entropy, on_place, fmean(found))
    return dict(zip(UNITS, values, strict=True))


def arms(parsed: argparse.Namespace, report: Report, is_causal: bool) -> None:
    """Train and score the arms of one part."""
    learn_from, test_on = pictures()
    kinds = ("contrastive", "maps") if is_causal else ALIGNMENTS
    title = "causal" if is_causal else "bidirectional"
    found: dict[str, dict[str, list[float]]] = {unit: {} for unit in UNITS}
    for seed in parsed.seeds:
        models: dict[str, nn.Module] = {OURS: classifier(seed, 0.0, is_causal, None)}
        models |= {kind: classifier(seed, parsed.coefficient, is_causal, kind) for kind in kinds}
        take_step = {name: stepper(model.train(), parsed.steps, 2e-3) for name, model in models.items()}
        generator = torch.Generator().manual_seed(seed)
        for _ in range(parsed.steps):
            batch = batch_of(BATCH, learn_from, generator)
            for take in take_step.values():
                take(batch)
        test = batch_of(TEST, test_on, torch.Generator().manual_seed(seed + 100))
        for name, model in models.items():
            for unit, value in scores(model, test, is_causal).items():  # type: ignore[arg-type]
                found[unit].setdefault(f"{name}_{unit}", []).append(value)
        for unit in UNITS:
            report.add(f"{title}, {unit}, seed {seed}", {key: v[-1] for key, v in found[unit].items()}, unit)
    for unit in UNITS:
        report.add(f"{title}, {unit}, mean", {key: fmean(values) for key, values in found[unit].items()}, unit)
    spread = {key.replace("_accuracy", "_spread"): pstdev(values) for key, values in found["accuracy"].items()}
    report.add(f"{title}, accuracy, spread", spread, "spread")


def main(arguments: list[str] | None = None) -> None:
    options = (
        ("--steps", {"type": int, "default": 150, "help": "training steps of an arm (default 150)"}),
        ("--seeds", {"type": int, "nargs": "+", "default": [0, 1, 2]}),
        ("--coefficient", {"type": float, "default": 0.3, "help": "alignment_loss_coef (default 0.3)"}),
        ("--parts", {"nargs": "+", "choices": ["bidirectional", "causal"], "default": ["bidirectional", "causal"]}),
    )
    parsed = parse("Kinds of cross-modal alignment.", arguments, *options)
    if parsed.quick:
        parsed.steps, parsed.seeds = 2, [0]
    report = Report(f"alignment, coefficient {parsed.coefficient}", parsed)
    for part in parsed.parts:
        arms(parsed, report, part == "causal")
    report.save()


if __name__ == "__main__":
    main()
