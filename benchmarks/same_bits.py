"""What every router, head and preset computes, to the bit: written before a change of the house, compared after it.

    python -m benchmarks.same_bits write out/before.json
    python -m benchmarks.same_bits compare out/before.json

For a fixed seed, on the CPU, one thread, `eager` experts and attention: losses and their terms, logits, norms of
gradients, greedy text and the experts chosen, for a batch of all three modalities and for text alone. Every weight is
drawn from a seed of its own name, so neither the order of construction nor a parameter that is gone changes the others.
"""

import argparse
import hashlib
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chorus_moe import (
    ChorusConfig,
    ChorusForConditionalGeneration,
    ChorusForContrastive,
    ChorusForSequenceClassification,
)

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
    "router_aux_loss_coef": 0.01,
    "router_z_loss_coef": 0.001,
    "alignment_loss_coef": 0.01,
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
    "adaptive": banks(adaptive_experts=True),
    "router noise": banks(router_jitter_noise=0.1),
    "own gate": {"expert_banks": {"common": {}, "new": {"gate": "own"}}},
    "preset uniform": {"expert_banks": "uniform"},
    "preset specific_then_common": {"expert_banks": "specific_then_common"},
    "no shared experts": {"shared_expert_intermediate_size": 0},
    "post norm": {"norm_placement": "post"},
    "windows and global tokens": SLIDING | {"num_global_tokens": 3},
    "skip gates": {"skip_budget": 0.3},
    "exits": {"exit_layers": [1], "exit_loss_coef": 1.0},
    "linear experts": {"experts_layout": "linear"},
}
HEADS: dict[str, type] = {
    "generation": ChorusForConditionalGeneration,
    "classification": ChorusForSequenceClassification,
    "contrastive": ChorusForContrastive,
}


def build(head: str, text: dict[str, Any]) -> Any:
    config = ChorusConfig(
        text_config=TEXT | text,
        vision_config=VISION,
        audio_config=AUDIO,
        image_token_id=IMAGE_TOKEN,
        audio_token_id=AUDIO_TOKEN,
    )
    model = HEADS[head]._from_config(config, attn_implementation="eager", experts_implementation="eager")
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(value, nn.Parameter) or "correction_bias" in name:
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            value.data.copy_(noise * 0.08 + (1.0 if "norm" in name and value.ndim == 1 and "bias" not in name else 0.0))
    if head == "generation":
        model.generation_config.eos_token_id = None
    return model


def batch_of(model: Any, has_media: bool, head: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 128, (3, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[2, :5] = ids[2, :5] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if has_media:
        frames = [11, 20, 17]
        for row in range(3):
            ids[row, 6 : 6 + model.config.vision_config.num_image_tokens] = IMAGE_TOKEN
            ids[row, 14 : 14 + model.config.audio_config.num_audio_tokens(frames[row])] = AUDIO_TOKEN
        heard = torch.arange(max(frames))[None, :] < torch.tensor(frames)[:, None]
        batch |= {
            "pixel_values": torch.randn(3, 3, 32, 32, generator=generator),
            "input_features": torch.randn(3, max(frames), 16, generator=generator) * heard[..., None],
            "input_features_mask": heard.long(),
        }
    batch["mm_token_type_ids"] = (ids == IMAGE_TOKEN).long() + 3 * (ids == AUDIO_TOKEN).long()
    if head == "generation":
        batch["labels"] = ids.masked_fill((batch["mm_token_type_ids"] > 0) | (mask == 0), -100)
    elif head == "classification":
        batch["labels"] = torch.tensor([0, 1, 0])
    else:
        del batch["mm_token_type_ids"]  # this head reads each modality by itself
    return batch


def fingerprint(value: Tensor) -> list[Any]:
    """A hash of the bytes, and three numbers to see how far two values are apart."""
    value = value.detach().contiguous()
    digest = hashlib.sha256(value.numpy().tobytes()).hexdigest()[:16]
    numbers = value.double()
    return [digest, numbers.sum().item(), numbers.abs().sum().item(), numbers.flatten()[:1].sum().item()]


def routing_of(layers: Any) -> Iterator[tuple[str, Tensor]]:
    for index, layer in enumerate(layers or ()):
        for name, bank in layer.items():
            yield f"experts {index} {name}", bank.selected_experts
            yield f"weights {index} {name}", bank.routing_weights


def record(head: str, text: dict[str, Any], has_media: bool) -> dict[str, list[Any]]:
    model = build(head, text)
    batch = batch_of(model, has_media, head)
    found: dict[str, list[Any]] = {}
    asked = {"return_loss": True} if head == "contrastive" else {}
    for mode in ("eval", "train"):
        model.train(mode == "train")
        torch.manual_seed(0)
        outputs = model(**batch, output_router_logits=True, **asked)
        for name, value in outputs.items():
            if isinstance(value, Tensor):
                found[f"{mode} {name}"] = fingerprint(value)
        for name, value in routing_of(outputs.get("router_logits")):
            found[f"{mode} {name}"] = fingerprint(value)
        if mode == "train" and outputs.loss is not None:
            outputs.loss.backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    found[f"gradient {name}"] = fingerprint(parameter.grad.double().norm())
    if head == "generation":
        model.eval()
        prompt = {name: value for name, value in batch.items() if name != "labels"}
        found["text"] = fingerprint(model.generate(**prompt, max_new_tokens=12, do_sample=False))
    return found


def record_all() -> dict[str, dict[str, list[Any]]]:
    torch.set_num_threads(1)
    result = {}
    for case, text in CASES.items():
        for head in HEADS if case in ("softmax", "exits") else ("generation",):
            if case == "exits" and head == "contrastive":
                continue  # no exits there
            for has_media in (True, False):
                if head == "contrastive" and not has_media:
                    continue  # one modality has nothing to be compared with
                name = f"{case}, {head}, {'all modalities' if has_media else 'text'}"
                try:
                    result[name] = record(head, text, has_media)
                except ValueError as error:
                    result[name] = {"refused": [str(error)[:80]]}
    return result


def compare(before: dict[str, dict[str, list[Any]]], after: dict[str, dict[str, list[Any]]]) -> bool:
    """Print what differs; a value that only one side has is named, since a parameter may be gone for good."""
    is_same, checked, gone = True, 0, set()
    for case in sorted(before.keys() | after.keys()):
        old, new = before.get(case, {}), after.get(case, {})
        gone |= old.keys() ^ new.keys()
        for name in sorted(old.keys() & new.keys()):
            checked += 1
            if old[name] != new[name]:
                is_same = False
                print(f"{case}: {name}: {old[name]} -> {new[name]}")
    if gone:
        print(f"only on one side: {', '.join(sorted(gone))}")
    print(f"{checked} values of {len(after)} cases compared: {'the same bits' if is_same else 'they differ'}")
    return is_same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["write", "compare"])
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    found = record_all()
    if given.action == "write":
        given.file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        print(f"{sum(map(len, found.values()))} values of {len(found)} cases in {given.file}")
    else:
        sys.exit(not compare(json.loads(given.file.read_text(encoding="utf-8")), found))


if __name__ == "__main__":
    main()
