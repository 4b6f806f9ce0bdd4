"""Teachers: frozen models that say what they expect of a batch.

Unusual here:
- a teacher is no module of the student or of an objective, so it is not trained, saved, counted or switched to
  training;
- its probabilities are those of tokens that both tokenizers have under the same ids. A Chorus model made of a text
  model has that model's tokens and its own for media, which are never answers;
- a teacher without one of the student's modalities reads the rows of text alone. The others learn from their labels.

Shape suffixes: B batch, S sequence, N positions that predict a label, V shared tokens.
"""

import inspect
import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.modeling_generation import ChorusForConditionalGeneration
from chorus_moe.modeling.modeling_outputs import RoutingOfLayer
from chorus_moe.processors.processing_chorus import ChorusProcessor
from chorus_moe.processors.processing_media import MEDIA
from chorus_moe.training.loading import (
    DTYPES,
    ModelOrAdapter,
    base_model,
    check_source,
    device_of,
    is_adapter,
    load_model,
    load_processor,
)
from chorus_moe.training.objectives.divergences import TokenProbabilities, log_probabilities
from chorus_moe.training.readiness import check_weights

logger = logging.get_logger(__name__)
# What a text model is given of a batch, and a Chorus model of rows of text.
TEXT_INPUTS = ("input_ids", "attention_mask")
NOT_INPUTS = ("labels", "num_items_in_batch")
# Which media are taken at all, and names: they do not change what a medium becomes.
NO_MATTER = ("max_audio_seconds", "on_long_audio", "strict_sampling_rate", "allow_silence")


class TeacherOutput(NamedTuple):
    """What a teacher says of a batch.

    Args:
        tokens: of the N positions that are read, in the order of the samples.
        positions: `(B, S)` bool, which positions these are: those that predict a label.
        samples: `(B,)` bool, the samples that the teacher reads.
        hidden_states: of these samples, `(b, S, D)` each, as models return them; None unless asked for.
        routing: of each sparse layer; None unless asked for.
    """

    tokens: TokenProbabilities
    positions: Tensor
    samples: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    routing: tuple[RoutingOfLayer, ...] | None = None


class Teacher:
    """One model or several, whose probabilities are averaged (Hinton et al., arXiv 1503.02531).

    Args:
        sources: folders or Hub ids of causal or Chorus models, or of adapters.
        dtype: "auto" (as saved), "float32", "bfloat16" or "float16".
        temperature: logits are divided by it.
        shares_encoders: batches may hold `mm_encoder_outputs`, since the student's encoders are the teacher's as well.

    Raises:
        ValueError: no source or an unknown dtype, a model that does not predict tokens, or a weight that is not finite.
    """

    def __init__(
        self, sources: Sequence[str], dtype: str = "auto", temperature: float = 1.0, shares_encoders: bool = False
    ):
        if not sources:
            raise ValueError("distillation.teachers names no teacher")
        if dtype not in DTYPES:
            raise ValueError(f"distillation.teacher_dtype={dtype!r}; choose from {', '.join(DTYPES)}")
        self.sources, self.temperature, self.shares_encoders = tuple(sources), temperature, shares_encoders
        self.models = [load_teacher(source, dtype) for source in sources]
        self.asks_hidden_states = self.asks_routing = False
        # How many ids all have in common, and whether all read what the student reads; `check` sets them.
        self.num_shared = min(base_model(model).config.get_text_config().vocab_size for model in self.models)
        self.reads_media = True
        self._checked: tuple[object, object] = (None, None)
        # Several objectives ask about one batch.
        self._last: tuple[Tensor, TeacherOutput | None] | None = None

    def check(self, student: ChorusConfig, processor: ChorusProcessor) -> None:
        """Compare tokenizers and media; once for each student.

        Raises:
            ValueError: another tokenizer, or pictures or sound in another form than the student's.
        """
        if self._checked[0] is student and self._checked[1] is processor:
            return
        modalities = set(student.modalities) - {"text"}
        for source, model in zip(self.sources, self.models, strict=True):
            config = base_model(model).config
            shared = shared_vocabulary(load_tokenizer(source), processor.tokenizer, source)
            if config.get_text_config().vocab_size < shared:
                raise ValueError(
                    f"teacher {source!r} has {config.get_text_config().vocab_size} logits for {shared} tokens"
                )
            self.num_shared = min(self.num_shared, shared)
            if modalities <= set(getattr(config, "modalities", ())):
                _compare_media(source, load_processor(source, base_of(source)), processor, modalities)
            else:
                self.reads_media = False
                logger.warning(
                    f"teacher {source!r} does not read all of {', '.join(sorted(modalities))}: rows with media "
                    "learn from their labels alone"
                )
        self._checked = (student, processor)

    @torch.no_grad()
    def read(self, inputs: Mapping[str, Any]) -> TeacherOutput | None:
        """What the teacher says of a batch with labels; None where it reads no sample of it."""
        input_ids = inputs["input_ids"]
        if self._last is None or self._last[0] is not input_ids:
            # First of all, so that two outputs are never in memory.
            self._last = None
            self._last = (input_ids, self._read(inputs))
        return self._last[1]

    def _read(self, inputs: Mapping[str, Any]) -> TeacherOutput | None:
        positions_BS = label_positions(inputs["labels"])
        samples_B = torch.ones_like(positions_BS[:, 0])
        given = {name: value for name, value in inputs.items() if name not in NOT_INPUTS}
        if not self.reads_media:
            samples_B = rows_of_text(inputs)
            positions_BS = positions_BS & samples_B[:, None]
            given = {name: given[name][samples_B] for name in TEXT_INPUTS}
        elif given.get("mm_encoder_outputs") and not self.shares_encoders:
            raise ValueError(
                "the batch holds what the student's encoders made of images and sound, and teacher "
                f"{self.sources[0]!r} has its own: train on the media themselves, without cached features"
            )
        if not samples_B.any():
            return None
        log_probs_NV = None
        for model in self.models:
            outputs, logits_NV = self._run(model, given, positions_BS[samples_B])
            found_NV = log_probabilities(logits_NV[:, : self.num_shared], self.temperature)
            log_probs_NV = found_NV if log_probs_NV is None else torch.logaddexp(log_probs_NV, found_NV)
        assert log_probs_NV is not None  # there is at least one model
        tokens = TokenProbabilities(log_probs_NV - math.log(len(self.models)) if len(self.models) > 1 else log_probs_NV)
        return TeacherOutput(
            tokens, positions_BS, samples_B, outputs.hidden_states, outputs.routing if self.asks_routing else None
        )

    def _run(self, model: ModelOrAdapter, given: dict[str, Any], positions_BS: Tensor) -> tuple[Any, Tensor]:
        """Outputs of one model, and its logits at some positions."""
        device = given["input_ids"].device
        if device_of(model) != device:
            model.to(device)
        base = base_model(model)
        if not isinstance(base, ChorusForConditionalGeneration):
            given = {name: given[name] for name in TEXT_INPUTS}
        options: dict[str, Any] = {"use_cache": False}
        if self.asks_hidden_states:
            options["output_hidden_states"] = True
        if self.asks_routing:
            options["output_router_logits"] = True
        columns_S = positions_BS.any(dim=0).nonzero().squeeze(1)
        # Logits of prompts would be most of the memory.
        if "logits_to_keep" in inspect.signature(base.forward).parameters and len(columns_S):
            options["logits_to_keep"] = columns_S
            positions_BS = positions_BS[:, columns_S]
        outputs = model(**given, **options)
        return outputs, outputs.logits[positions_BS]


def label_positions(labels_BS: Tensor) -> Tensor:
    """`(B, S)` bool: positions that predict a label."""
    # Position i predicts label i + 1, and the last position nothing.
    return F.pad(labels_BS[:, 1:] != -100, (0, 1), value=False)


def rows_of_text(inputs: Mapping[str, Any]) -> Tensor:
    """`(B,)` bool: samples without images and sound."""
    modality_BS = inputs.get("mm_token_type_ids")
    if modality_BS is None:
        return torch.ones_like(inputs["input_ids"][:, 0], dtype=torch.bool)
    return (modality_BS == 0).all(dim=1)


def load_teacher(source: str, dtype: str = "auto") -> ModelOrAdapter:
    """A model that predicts tokens, in evaluation mode and without gradients.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a model with another head, or a weight that is not finite.
    """
    check_source(source)
    config = AutoConfig.from_pretrained(base_of(source))
    if config.model_type == ChorusConfig.model_type:
        # Loading would give another head's weights a new, random one without an error.
        for name in config.architectures or ():
            if name != ChorusForConditionalGeneration.__name__:
                raise ValueError(f"teacher {source!r} is a {name}, which predicts no tokens")
        model, _ = load_model(source, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    try:
        check_weights(model)
    except ValueError as error:
        raise ValueError(f"teacher {source!r}: {error}") from error
    return model.eval().requires_grad_(False)


def base_of(source: str) -> str:
    """The model below an adapter, or the source itself."""
    if not is_adapter(source):
        return source
    from peft import PeftConfig

    return PeftConfig.from_pretrained(source).base_model_name_or_path or source


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base_of(source))


def shared_vocabulary(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase, source: str) -> int:
    """How many ids, from 0 on, mean the same to both. Tokens of the student's alone come behind them.

    Raises:
        ValueError: the first token of the teacher's that the student does not have under the same id.
    """
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    tokens = {index: token for token, index in ours.items()}
    for token, index in sorted(theirs.items(), key=itemgetter(1)):
        if ours.get(token) != index:
            found = f"is {tokens[index]!r}" if index in tokens else "does not exist"
            raise ValueError(
                f"teacher {source!r} has another tokenizer: its token {index} is {token!r}, the student's {found} "
                f"({len(theirs)} and {len(ours)} tokens). Probabilities are compared token by token, so the "
                "teacher must have the student's tokenizer"
            )
    return max(theirs.values()) + 1


def _compare_media(source: str, teacher: ChorusProcessor, student: ChorusProcessor, modalities: set[str]) -> None:
    theirs, ours = teacher.to_dict(), student.to_dict()
    for modality in sorted(modalities):
        for name in MEDIA[modality].settings:
            pairs = [(name, theirs.get(name), ours.get(name))]
            if isinstance(ours.get(name), Mapping) and isinstance(theirs.get(name), Mapping):
                keys = sorted((theirs[name].keys() | ours[name].keys()) - set(NO_MATTER))
                pairs = [(f"{name}.{key}", theirs[name].get(key), ours[name].get(key)) for key in keys]
            for setting, there, here in pairs:
                if there != here:
                    raise ValueError(
                        f"teacher {source!r} reads {modality} with {setting}={there!r}, the student with {here!r}: one "
                        "batch cannot serve both"
                    )
