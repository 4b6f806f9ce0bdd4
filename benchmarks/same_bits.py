"""What every router, head and preset computes, to the bit: written before a change of the house, compared after it.

    python -m benchmarks.same_bits write out/before.json
    python -m benchmarks.same_bits compare out/before.json

For a fixed seed, on the CPU, one thread, `eager` experts and attention: losses and their terms, logits, gradients and
their norms, greedy text and the experts chosen, for a batch of all three modalities and for text alone. Every weight is
drawn from a seed of its own name, so neither the order of construction nor a parameter that is gone changes the others.

A case that raises or is gone is a difference. A parameter that only one side has is named, and no difference.
"""

import argparse
import hashlib
import json
import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chorus_moe import (
    ChorusConfig,
    ChorusForConditionalGeneration,
    ChorusForContrastive,
    ChorusForSequenceClassification,
)

# The tests' small model has these sizes too (tests/conftest.py): another size here is another model in old files.
IMAGE_TOKEN, AUDIO_TOKEN, LENGTH = 3, 4, 24
TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {
    "architecture": "vit_tiny_patch16_224",
    "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2},
    "image_size": 32,
    "pool_size": 2,
}
AUDIO = {
    "num_mel_bins": 16,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_kernel_size": 7,
}
LOSSES = {"router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.001, "alignment_loss_coef": 0.01, "alignment": "maps"}
BANKS = ("text", "image", "audio", "common")
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6}


def banks(**settings: Any) -> dict[str, Any]:
    return {"expert_banks": {name: settings for name in BANKS}}


# Case -> settings of the text part; the heads follow in `HEADS`.
CASES: dict[str, dict[str, Any]] = {
    "softmax": banks(router="softmax"),
    "sigmoid": banks(router="sigmoid"),
    "attention": banks(router="attention"),
    "groups": banks(num_groups=2, topk_groups=1),
    **{f"balance {name}": banks(balance=name) for name in ("switch", "cv2", "variance", "bias", "none")},
    "capacity reroute": banks(expert_capacity=1.0, capacity_overflow="reroute"),
    "capacity drop": banks(expert_capacity=1.0, capacity_overflow="drop"),
    "adaptive": banks(adaptive_experts=True, num_experts_per_tok=3),
    "router noise": banks(router_jitter_noise=0.1),
    "own gate": {"expert_banks": {"common": {}, "new": {"gate": "own"}}},
    "preset uniform": {"expert_banks": "uniform"},
    "preset specific_then_common": {"expert_banks": "specific_then_common"},
    "no shared experts": {"shared_expert_intermediate_size": 0},
    "post norm": {"norm_placement": "post"},
    "windows and global tokens": SLIDING | {"num_global_tokens": 3},
    "skip gates": {"skip_budget": 0.3},
    "bidirectional": SLIDING | {"num_global_tokens": 3, "is_causal": False},
    "exits": {"exit_layers": [1], "exit_loss_coef": 1.0},
    "linear experts": {"experts_layout": "linear"},
}
HEADS: dict[str, type] = {
    "generation": ChorusForConditionalGeneration,
    "classification": ChorusForSequenceClassification,
    "contrastive": ChorusForContrastive,
}
# Cases for other heads than the generative one.
HEADS_OF = {
    "softmax": [*HEADS],
    "bidirectional": ["classification", "contrastive"],
    "exits": ["generation", "classification"],
}
EXIT_THRESHOLD = 0.55  # some samples leave and some stay
Record = dict[str, Any]


def build(head: str, text: dict[str, Any]) -> Any:
    config = ChorusConfig(
        text_config=TEXT | LOSSES | text,
        vision_config=VISION,
        audio_config=AUDIO,
        image_token_id=IMAGE_TOKEN,
        audio_token_id=AUDIO_TOKEN,
    )
    model = HEADS[head]._from_config(config, attn_implementation="eager", experts_implementation="eager")
    drawn = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "correction_bias" in n)]
    is_adaptive = any(bank.adaptive_experts for bank in config.text_config.banks)
    for name, value in drawn:
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        is_scale = value.ndim == 1 and name.endswith("weight")
        spread = 0.5 if is_adaptive and "router" in name else 0.05  # only a router that is sure leaves experts out
        value.data.copy_(noise * spread + (1.0 if is_scale else 0.0))
    if head == "generation":
        model.generation_config.eos_token_id = None
    return model


def batch_of(model: Any, has_media: bool, head: str) -> dict[str, Tensor]:
    """Three samples, each with an image and a clip if `has_media`; the last is padded on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 128, (3, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[2, :5] = ids[2, :5] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if has_media:
        frames = [11, 20, 17]
        heard = torch.arange(max(frames))[None, :] < torch.tensor(frames)[:, None]
        batch |= {
            "pixel_values": torch.randn(3, 3, 32, 32, generator=generator),
            "input_features": torch.randn(3, max(frames), 16, generator=generator) * heard[..., None],
            "input_features_mask": heard.long(),
        }
        if head == "contrastive":
            return batch  # this head reads each modality by itself, and texts without placeholders
        for row in range(3):
            ids[row, 6 : 6 + model.config.vision_config.num_image_tokens] = IMAGE_TOKEN
            ids[row, 14 : 14 + model.config.audio_config.num_audio_tokens(frames[row])] = AUDIO_TOKEN
    if head != "contrastive":
        batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long() + 3 * (ids == AUDIO_TOKEN).long()
    if head == "generation":
        batch["labels"] = ids.masked_fill((batch["mm_token_type_ids"] > 0) | (mask == 0), -100)
    elif head == "classification":
        batch["labels"] = torch.tensor([0, 1, 0])
    return batch


def fingerprint(value: Tensor) -> Record:
    """A hash of shape, type and bytes; all numbers of choices and small tensors, sums and the first of others."""
    value = value.detach().contiguous()
    what = f"{tuple(value.shape)} {value.dtype}".encode()
    flat = value.double().flatten()
    large = len(flat) > 96 and value.is_floating_point()
    numbers = [flat.sum().item(), flat.abs().sum().item(), *flat[:6].tolist()] if large else value.flatten().tolist()
    return {"sha256": hashlib.sha256(what + value.numpy().tobytes()).hexdigest(), "numbers": numbers}


def tensors_of(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an output by its place; of the routing, the choices, weights and scores of each bank."""
    if isinstance(value, Tensor):
        yield name, value
    elif hasattr(value, "selected_experts"):
        for part in ("selected_experts", "routing_weights", "router_logits"):
            yield from tensors_of(f"{name} {part}", getattr(value, part))
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors_of(f"{name} {key}", part)


def record(head: str, text: dict[str, Any], has_media: bool) -> Record:
    model = build(head, text)
    batch = batch_of(model, has_media, head)
    has_exit_heads = head == "classification" and "exit_layers" in text
    options = {"output_exit_logits": True} if has_exit_heads else {}
    found: Record = {"gradient_norms": {}, "gradients": {}}
    for mode in ("eval", "train"):
        model.train(mode == "train")
        torch.manual_seed(0)
        outputs = model(**batch, output_router_logits=True, **options)
        for name, value in outputs.items():
            found |= {f"{mode} {place}": fingerprint(part) for place, part in tensors_of(name, value)}
    loss = outputs.text_embeds[:, 0].sum() if outputs.loss is None else outputs.loss
    loss.backward()
    norms = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            found["gradient_norms"][name] = found["gradients"][name] = None
        else:
            norms[name] = parameter.grad.double().norm().item()
            found["gradient_norms"][name] = norms[name].hex()
            found["gradients"][name] = fingerprint(parameter.grad)["sha256"]
    found["gradient_norm"] = {"hex": (total := math.hypot(*sorted(norms.values()))).hex(), "numbers": [total]}
    model.eval()
    if head == "generation":
        prompt = {name: value for name, value in batch.items() if name != "labels"} | {"max_new_tokens": 12}
        found["text"] = fingerprint(model.generate(**prompt, do_sample=False)[:, LENGTH:])
        if "exit_layers" in text:  # drafts are for one sample
            one = {name: value[:1] if isinstance(value, Tensor) else value for name, value in prompt.items()}
            drafted = model.generate(**one, do_sample=False, assistant_early_exit=1)
            found["text of drafts"] = fingerprint(drafted[:, LENGTH:])
    if has_exit_heads:
        model.config.exit_thresholds = [EXIT_THRESHOLD]
        outputs = model(**batch)
        found["left logits"], found["left after"] = fingerprint(outputs.logits), fingerprint(outputs.left_after)
    return found


def record_all() -> dict[str, Record]:
    torch.set_num_threads(1)
    result: dict[str, Record] = {}
    for case, text in CASES.items():
        for head in HEADS_OF.get(case, ["generation"]):
            for has_media in (True, False):
                name = f"{case}, {head}, {'all modalities' if has_media else 'text'}"
                try:
                    result[name] = record(head, text, has_media)
                except Exception as error:
                    result[name] = {"error": f"{type(error).__name__}: {error}"}
    return result


def largest_difference(old: Any, new: Any) -> str:
    """In words, where both sides hold as many numbers."""
    if isinstance(old, str) and isinstance(new, str) and old.startswith("0x") and new.startswith("0x"):
        old, new = {"numbers": [float.fromhex(old)]}, {"numbers": [float.fromhex(new)]}
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{old} -> {new}"
    pair = old["numbers"], new["numbers"]
    if len(pair[0]) != len(pair[1]):
        return "another number of values"
    return f"largest difference of the numbers {max(abs(a - b) for a, b in zip(*pair, strict=True)):.3g}"


def differences(old: Record, new: Record) -> Iterator[tuple[str, str]]:
    """Field and how it differs; parameters that one side lacks are left out."""
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            value = new.get(name, old.get(name))
            yield name, f"only {'after' if name in new else 'before'}" + (f": {value}" if name == "error" else "")
        elif name in ("gradient_norms", "gradients"):
            for parameter in sorted(old[name].keys() & new[name].keys()):
                if old[name][parameter] != new[name][parameter]:
                    yield f"{name} {parameter}", largest_difference(old[name][parameter], new[name][parameter])
        elif old[name] != new[name]:
            yield name, largest_difference(old[name], new[name])


def compare(before: dict[str, Record], after: dict[str, Record]) -> bool:
    """Print what differs, and as a note the parameters that one side lacks."""
    found, one_sided = 0, set()
    for case in sorted(before.keys() | after.keys()):
        if case not in before or case not in after:
            found += 1
            print(f"{case}: only {'after' if case in after else 'before'}")
            continue
        sides = [set(side[case].get("gradient_norms", {})) for side in (before, after)]
        if all(sides):
            one_sided |= {f"{name} (before)" for name in sides[0] - sides[1]}
            one_sided |= {f"{name} (after)" for name in sides[1] - sides[0]}
        for name, how in differences(before[case], after[case]):
            found += 1
            print(f"{case}: {name}: {how}")
    if one_sided:
        print(f"note: parameters on one side only: {', '.join(sorted(one_sided))}")
    print(f"{len(after)} cases compared: {f'{found} differences' if found else 'the same bits'}")
    return not found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["write", "compare"])
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    found = record_all()
    if given.action == "compare":
        sys.exit(not compare(json.loads(given.file.read_text(encoding="utf-8")), found))
    given.file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    errors = [f"{case}: {value['error']}" for case, value in found.items() if "error" in value]
    print(*errors, f"{len(found)} cases in {given.file}", sep="\n")
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
