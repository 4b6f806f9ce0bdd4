"""What a request of the chat address may hold, checked before any work: untrusted clients write it."""

from collections.abc import Mapping
from typing import Any

from chorus_moe.processors.processing_limits import MediaError

# OpenAI's parts, and where each holds its text, address or base64.
PARTS = {"text": "text", "image_url": "url", "audio_url": "url", "input_audio": "data"}
# OpenAI's fields that change the answer and have no meaning here; such a request would get another answer than it asked
# for. `generation_config` could ask for any amount of memory.
REFUSED = (
    "audio", "function_call", "functions", "generation_config", "logprobs", "modalities", "n", "prediction",
    "presence_penalty", "reasoning_effort", "response_format", "tool_choice", "top_logprobs", "verbosity",
    "web_search_options",
)  # fmt: skip
# What these fields say where they ask for nothing.
NOTHING: tuple[object, ...] = (None, 0, 1, False, "auto", "none", ["text"], {"type": "text"}, [], {})
# Other keywords would reach the processor's own settings.
TEMPLATE_KEYWORDS = ("enable_thinking",)
RANGES = {"temperature": (0.0, 2.0), "top_p": (0.0, 1.0), "frequency_penalty": (-0.9, 2.0)}


def check_request(body: Mapping[str, Any]) -> None:
    """Refuse what is not OpenAI's, not ours, or would read a file of this machine.

    Raises:
        MediaError: a message or a part of it, by its number.
        ValueError: another field, by its name.
    """
    for name in REFUSED:
        if name in body and body[name] not in NOTHING:
            raise ValueError(f"{name}={str(body[name])[:80]}: not supported here, leave it out")
    keywords = body.get("chat_template_kwargs") or {}
    unknown = sorted(keywords.keys() - set(TEMPLATE_KEYWORDS)) if isinstance(keywords, Mapping) else keywords
    if unknown:
        raise ValueError(f"chat_template_kwargs: {unknown!r:.80}; it may hold {TEMPLATE_KEYWORDS}")
    for name, value in ({"stream": body.get("stream")} | dict(keywords)).items():
        # A string "false" would mean yes.
        if value is not None and type(value) is not bool:
            raise ValueError(f"{name}={value!r:.80}: expected true or false")
    for name, (low, high) in RANGES.items():
        value = body.get(name)
        # By exact type: JSON's true is a number in Python.
        if value is not None and not (type(value) in (int, float) and low <= value <= high):
            raise ValueError(f"{name}={value!r:.80}: expected a number from {low:g} to {high:g}")
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is not None and not (type(value) is int and value >= 1):
            raise ValueError(f"{name}={value!r:.80}: expected a whole number of tokens from 1 on")
    seed = body.get("seed")
    # Within what `torch.manual_seed` takes.
    if seed is not None and not (type(seed) is int and -(2**63) <= seed < 2**64):
        raise ValueError(f"seed={seed!r:.80}: expected a whole number of at most 64 bits")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: expected a list of at least one message")
    for number, message in enumerate(messages):
        check_message(message, number)


def check_message(message: object, number: int) -> None:
    """Raises: MediaError: as in `check_request`."""
    where = f"message {number}"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise MediaError(f"{where}: expected an object with a role, found {message!r:.80}", modality="text")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise MediaError(f"{where}: content is a string or a list of parts, found {content!r:.80}", modality="text")
    for index, part in enumerate(content):
        check_part(part, f"{where}, part {index}")


def check_part(part: object, where: str) -> None:
    """Raises: MediaError: as in `check_request`."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or kind not in PARTS:
        raise MediaError(f"{where}: unknown type {kind!r:.80}; choose from {', '.join(PARTS)}", modality="text")
    value: object = part.get(kind)
    if isinstance(value, dict):
        value = value.get(PARTS[kind])
    if not isinstance(value, str):
        raise MediaError(f"{where}: {kind} holds no {PARTS[kind]}", modality="text")
    # The processor would read a path, which here is one of the server's own files.
    if PARTS[kind] == "url" and not value.startswith("data:"):
        raise MediaError(
            f"{where}: nothing is fetched, send the file itself as data:...;base64,..., found {value[:80]!r}",
            modality="image" if kind == "image_url" else "audio",
        )
