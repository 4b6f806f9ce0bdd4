"""Checks of what is stored: tensors, the processor beside them, saving and loading, and the export for the Hub."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from chorus_moe.modeling.configuration_modalities import ENCODED
from chorus_moe.modeling.moe_banks import BankGate
from chorus_moe.training.doctor import export_probe
from chorus_moe.training.doctor.finding import Finding, compared, counted, difference
from chorus_moe.training.doctor.inputs import ANSWER, Batch, Patient
from chorus_moe.training.doctor.state import nan_memory
from chorus_moe.training.hub import export_for_hub
from chorus_moe.training.loading import is_finite

EXPORT_SECONDS = 600


def tensors(patient: Patient) -> Finding:
    """No NaN or infinity, no weight that is zero all over, and computed buffers as they are computed."""
    faults = [
        f"{name} holds NaN or infinity" for name, tensor in _state(patient.model).items() if not is_finite(tensor)
    ]
    for name, module in patient.decoder.named_modules():
        # Not stored in a checkpoint, so nothing but this check would notice that they were not rebuilt.
        expected = _computed_buffers(module)
        for key, value in expected.items():
            found = getattr(module, key)
            if not torch.equal(value.to(found), found):
                faults.append(f"buffer {name}.{key} is not what the configuration gives")
    zeros = {
        f"{name} is zero all over": "Right for a part that was added with an output of zero and not trained yet; any "
        "other was lost"
        for name, parameter in patient.model.named_parameters()
        if parameter.numel() and not parameter.any() and not name.endswith("bias") and ".lora_" not in name
    }
    return counted(
        faults,
        f"{sum(p.numel() for p in patient.model.parameters()):,} parameters",
        "Load again from a good checkpoint; NaN comes from training that diverged (lower the learning rate, use "
        "bfloat16 instead of float16), a wrong buffer from a class that does not rebuild it in `_init_weights`",
        zeros,
    )


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**model.state_dict(), **dict(model.named_buffers())}


def _computed_buffers(module: Any) -> dict[str, Tensor]:
    """Buffers that are not stored, as they should be."""
    if isinstance(module, BankGate):
        return {"is_open": module.open_table()}
    # The other kinds change their table with the length of the input.
    if isinstance(module, LlamaRotaryEmbedding) and module.rope_type not in ("dynamic", "longrope"):
        return {"inv_freq": LlamaRotaryEmbedding(module.config).inv_freq}
    return {}


def processor(patient: Patient) -> Finding:
    """Model and processor agree on tokens, sizes and rates, and the towers yield as many tokens as placeholders."""
    pairs = [*_token_pairs(patient), *_vision_pairs(patient), *_audio_pairs(patient)]
    faults = [f"{what}: processor {found}, model {wanted}" for what, found, wanted in pairs if found != wanted]
    faults += _too_few_rows(patient)
    # A wrong setting would make every sample fail, and hide itself behind that.
    if not faults:
        faults += _miscounted(patient)
    ends = patient.base.generation_config.eos_token_id
    # `generation_config` holds one id or a list.
    ends = ends if isinstance(ends, list) else [ends]
    eos = patient.processor.tokenizer.eos_token_id
    warnings = {
        f"generation ends at {ends}, the tokenizer's end is {eos}": "Set model.generation_config.eos_token_id to the "
        "token that ends an answer, or generation runs to its limit"
    }
    return counted(
        faults,
        f"{len(pairs)} settings",
        "Make the processor anew with processor_from_config(model.config, tokenizer) and save it beside the "
        "model; after tokens were added: model.resize_token_embeddings(len(tokenizer)), and train",
        {} if eos in ends else warnings,
    )


def batch_padding(patient: Patient) -> Finding:
    """The processor and its saved copy pad a batch by themselves as `generate` needs it, on the left."""
    with TemporaryDirectory() as folder:
        patient.processor.save_pretrained(folder)
        saved = type(patient.processor).from_pretrained(folder)
    faults = []
    for name, found in (("the processor", patient.processor), ("its saved copy", saved)):
        batch = Patient(patient.model, found).encode(patient.rows[:2], side=None)
        if not batch["attention_mask"][:, -1].all():
            faults.append(f"{name} pads on the right, where generation goes on")
    return counted(
        faults,
        "a batch is padded on the left, also after saving",
        'Set processor.tokenizer.padding_side = "left", and save it',
    )


def chat_template(patient: Patient) -> Finding:
    """The chat template writes every medium, marks the assistant's words, and ends them where generation ends."""
    ends = patient.base.generation_config.eos_token_id
    faults, warnings = [], {}
    for number, row in enumerate(patient.rows):
        try:
            batch = patient.processor.apply_chat_template(
                row["messages"], images=row["images"], audio=row["audio"], return_labels=True
            )
        except Exception as error:  # noqa: BLE001  a template is a program, which can raise anything
            faults.append(f"sample {number}: {error}")
            continue
        labels = [label for label in batch["labels"][0] if label != -100]
        text = patient.processor.tokenizer.decode(labels)
        if ANSWER not in text:
            faults.append(f"sample {number}: the labels are {text!r:.80}, not the answer")
        elif ends is not None and labels[-1] not in np.ravel(ends):
            token = patient.processor.tokenizer.decode(labels[-1:])
            warnings[f"answers end with {token!r}, generation at {ends}"] = (
                "Add that token's id to model.generation_config.eos_token_id, or generation runs to its limit"
            )
    return counted(
        faults,
        f"labels of {len(patient.rows)} samples",
        "Use a template that writes images and sound in their place and puts the assistant's words between "
        "{% generation %} and {% endgeneration %}; `compose` makes one of the text parent's",
        warnings,
    )


def _token_pairs(patient: Patient) -> list[tuple[str, Any, Any]]:
    model, ours = patient.base.config, patient.processor
    pairs: list[tuple[str, Any, Any]] = []
    for row, count in zip(ENCODED, (ours.num_image_tokens, ours.frames_per_token), strict=True):
        tower = getattr(model, row.config)
        pairs.append((f"takes {row.name}", count is not None, tower is not None))
        if tower is not None:
            pairs.append((row.token_id, getattr(ours, row.token_id), getattr(model, row.token_id)))
    return pairs


def _vision_pairs(patient: Patient) -> list[tuple[str, Any, Any]]:
    vision, images = patient.base.config.vision_config, patient.processor.image_processor
    if vision is None:
        return []
    size = (images.size["height"], images.size["width"])
    return [
        ("tokens of an image", patient.processor.num_image_tokens, vision.num_image_tokens),
        ("image size", size, (vision.image_size, vision.image_size)),
        ("image channels", images.num_channels, vision.num_channels),
    ]


def _audio_pairs(patient: Patient) -> list[tuple[str, Any, Any]]:
    audio, sounds = patient.base.config.audio_config, patient.processor.feature_extractor
    if audio is None:
        return []
    names = ("sampling_rate", "n_fft", "hop_length", "max_seconds")
    return [
        ("frames of an audio token", patient.processor.frames_per_token, audio.frames_per_token),
        ("mel bins", sounds.feature_size, audio.num_mel_bins),
        *((name, getattr(sounds, name), getattr(audio, name)) for name in names),
    ]


def _too_few_rows(patient: Patient) -> list[str]:
    """Tokens without an embedding, or without a logit."""
    tokens = len(patient.processor.tokenizer)
    base = patient.base
    rows = {"input embeddings": base.get_input_embeddings(), "output embeddings": base.get_output_embeddings()}
    return [
        f"{name} have {len(layer.weight)} rows for the {tokens} tokens of the tokenizer"
        for name, layer in rows.items()
        if len(layer.weight) < tokens
    ]


def _miscounted(patient: Patient) -> list[str]:
    """Rows whose placeholders the model does not accept."""
    faults = []
    for number, row in enumerate(patient.rows):
        try:
            patient.logits(patient.encode([row]))
        except (ValueError, IndexError) as error:
            faults.append(f"sample {number}: {error}")
    return faults


def reload(patient: Patient) -> Finding:
    """Saved and loaded again, where uninitialised memory is NaN, every tensor and every output is the same bit for bit
    (outputs within the tolerance off the CPU). Copies the model."""
    batch = patient.encode()
    expected = torch.cat(patient.logits(batch))
    # A buffer that loading forgets holds whatever was in memory, which is often the right value by chance. NaN shows
    # it.
    with TemporaryDirectory() as temporary, nan_memory():
        loaded = Patient(_saved_and_loaded(patient, Path(temporary)), patient.processor)
        left, right = _state(patient.model), _state(loaded.model)
        faults = [f"{name} is lost or new" for name in sorted(left.keys() ^ right.keys())]
        faults += [
            f"{name} differs" for name in sorted(left.keys() & right.keys()) if not _is_same(left[name], right[name])
        ]
        found = torch.cat(loaded.logits(batch))
    is_cpu = patient.device.type == "cpu"
    gap = difference(found, expected)
    if gap > (0.0 if is_cpu else patient.tolerance):
        faults.append(f"the logits differ by {gap:.1e} of their spread")
    return counted(
        faults,
        f"{len(left)} tensors and the logits",
        "Do not rely on a saved copy yet. A buffer that is not saved must be rebuilt in `_init_weights`; a part that "
        "was put into the model by hand must be in its configuration",
    )


def _saved_and_loaded(patient: Patient, folder: Path) -> Any:
    # Base and adapter are saved apart, as users save them.
    base = deepcopy(patient.model).unload() if patient.is_adapted else patient.base
    kind = type(base)
    base.save_pretrained(folder / "model")
    # Before the second copy is loaded.
    del base
    loaded = kind.from_pretrained(folder / "model")
    if patient.is_adapted:
        from peft import PeftModel

        patient.model.save_pretrained(folder / "adapter")
        loaded = PeftModel.from_pretrained(loaded, folder / "adapter")
    loaded = loaded.to(patient.device).eval()
    decoder = Patient(loaded, patient.processor).decoder
    # Implementations are not saved, and another one would give other bits.
    decoder.set_attn_implementation(patient.text_config._attn_implementation)
    decoder.set_experts_implementation(patient.text_config._experts_implementation)
    return loaded


def _is_same(found: Tensor, expected: Tensor) -> bool:
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        # NaN differs from itself; here it counts as the same, since `tensors` reports it.
        and bool(((found == expected) | (found.isnan() & expected.isnan())).all())
    )


def hub_export(patient: Patient) -> Finding:
    """Exported for the Hub, with its adapter merged, and loaded by a fresh process that cannot import this package, the
    model gives the same logits. Copies the model, into that process and, with an adapter, in this one.

    That process alone loads with `trust_remote_code`, and only the folder that was written here a moment before, with
    this package's own code in it.
    """
    batch = patient.encode()
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = deepcopy(patient.model).merge_and_unload() if patient.is_adapted else patient.base
        export_for_hub(model, patient.processor, folder / "export")
        with torch.no_grad():
            _store(model, batch, folder / "expected.safetensors")
        # The probe loads its own copy.
        del model
        done = _probe(folder, patient.device)
    cure = (
        "Export with `chorus-moe export`, which copies the code; a class of your own must lie in a flat folder and "
        "import its siblings as `from .name import ...`"
    )
    if done.returncode != 0:
        # The last line of a traceback is the error.
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        return Finding(verdict="failed", explanation=f"the export does not load: {last}", cure=cure)
    gap = json.loads(done.stdout.splitlines()[-1])["difference"]
    # Not zero: fast paths stay home, and transformers' own experts sum in another order.
    return compared([(gap, "logits")], patient.tolerance, "here and in a process without this package", cure)


def _store(model: Any, batch: Batch, path: Path) -> None:
    tensors = batch | {"logits": model(**batch).logits}
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def _probe(folder: Path, device: torch.device) -> subprocess.CompletedProcess:
    """Run `export_probe.py` as a program, with a cache of its own for remote code."""
    arguments = [folder / "export", folder / "expected.safetensors", device, torch.get_num_threads()]
    command = [sys.executable, "-P", "-W", "ignore", str(export_probe.__file__), *map(str, arguments)]
    # Remote code is cached by folder name: without a cache of its own, code of an earlier export could run.
    variables = {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=folder, env=os.environ | variables, capture_output=True, text=True, timeout=EXPORT_SECONDS
    )
