"""What a user has from others before the first step: parents with tokenizer and template, pictures, sounds, rows."""

import struct
from pathlib import Path

import av
import numpy as np
import soundfile
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM, WhisperModel

from tests.parents import SIZES, feature_extractor, plain_tokenizer, save_vision_parent, whisper_config

# ChatML with a default system prompt, as Qwen and SmolLM have it.
TEMPLATE = """\
{%- for message in messages -%}
    {%- if loop.first and message['role'] != 'system' -%}
        {{- '<|im_start|>system\\nYou answer briefly.<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
COLOURS = {"red": (200, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 210), "yellow": (230, 210, 40)}
RATE = 16_000
TONES = {"low": 220.0, "high": 1760.0}


def save_parents(folder: Path) -> None:
    """`text`, `vision` and `audio`, as their own projects save them."""
    save_text_parent(folder / "text")
    save_vision_parent("siglip", folder / "vision")
    save_audio_parent(folder / "audio")


def save_text_parent(folder: Path) -> None:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    names = {"bos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    tokenizer = plain_tokenizer(others=tokens, extra_special_tokens=tokens[1:], chat_template=TEMPLATE, **names)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    sizes = SIZES | {"num_key_value_heads": 1, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    torch.manual_seed(0)
    # At the usual .02 a model as small as this one answers every question with the same token.
    config = LlamaConfig(**sizes, initializer_range=0.3, **{f"{name}_id": value for name, value in ids.items()})
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_audio_parent(folder: Path) -> None:
    """A Whisper of windows of one second."""
    config = whisper_config()
    # At the usual .02 what is heard is lost beside the positions that are added to it.
    config.init_std = 0.3
    torch.manual_seed(0)
    WhisperModel(config).save_pretrained(folder)
    feature_extractor("whisper").save_pretrained(folder)


def write_pictures(folder: Path) -> None:
    """A picture of each colour in four kinds of file; PNG and WebP are without loss."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        noise = rng.integers(-20, 21, (30, 44, 3))
        picture = Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{name}.png")
        picture.save(folder / f"{name}.jpg", quality=90, progressive=True)
        picture.save(folder / f"{name}.webp", lossless=True)


def write_sounds(folder: Path) -> None:
    """A low and a high tone of half a second in five kinds of file; WAV and FLAC are without loss."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, frequency in TONES.items():
        wave = 0.4 * np.sin(2 * np.pi * frequency * np.arange(RATE // 2) / RATE) + rng.normal(0, 0.01, RATE // 2)
        samples = np.round(wave * 32767).astype(np.int16)
        write_espeak_wav(folder / f"{name}.wav", samples)
        soundfile.write(folder / f"{name}.flac", samples, RATE)
        soundfile.write(folder / f"{name}.ogg", samples, RATE)
        soundfile.write(folder / f"{name}.mp3", samples, RATE)
        write_m4a(folder / f"{name}.m4a", samples)


def write_espeak_wav(path: Path, samples: np.ndarray) -> None:
    """As `espeak-ng --stdout > path` does it: the sizes in the header are what a pipe could bear, not what it held."""
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 0x7FFFF024, b"WAVE", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16,
                         b"data", 0x7FFFF000)  # fmt: skip
    path.write_bytes(header + samples.astype("<i2").tobytes())


def write_m4a(path: Path, samples: np.ndarray) -> None:
    """AAC, as telephones record."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def picture(name: str) -> dict[str, str]:
    return {"type": "image", "image": f"pictures/{name}"}


def sound(name: str) -> dict[str, str]:
    return {"type": "audio", "audio": f"sounds/{name}"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def sharegpt_rows(kinds: tuple[str, ...] = ("png", "jpg", "webp"), sounds: tuple[str, ...] = ("wav",)) -> list[dict]:
    """Questions about the pictures and sounds in the layout of LLaMA-Factory, media marked in the text."""
    rows = [("images", f"pictures/{name}.{kind}", "<image>which colour?", name) for name in COLOURS for kind in kinds]
    rows += [("audios", f"sounds/{name}.{kind}", "<audio>low or high?", name) for name in TONES for kind in sounds]
    return [
        {
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
            "images": [],
            "audios": [],
        }
        | {column: [path]}
        for column, path, question, answer in rows
    ]
