"""Drafts of a model's first layers, which all its layers verify: less time for the text of `generate`, which they leave
as it is (LayerSkip, arXiv 2404.16710). Registered with the model for `assistant_early_exit`.

Shape suffixes: S sequence.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import StaticCache
from transformers.generation import LogitsProcessorList
from transformers.generation.candidate_generator import CandidateGenerator

from chorus_moe.modeling.configuration_checks import check_exit
from chorus_moe.modeling.configuration_services import SERVICES
from chorus_moe.modeling.modeling_outputs import CACHE


def check_drafts(generation_config: GenerationConfig, num_hidden_layers: int, threshold: float | None) -> None:
    """Refuse drafts that cannot be made, before any work.

    Args:
        threshold: the `exit_confidence` of the same call.

    Raises:
        ValueError: an exit that the model does not have, an empty draft, or beams (transformers would leave the drafts
            out with a warning); an `exit_confidence`, no cache or a static one.
    """
    exit_layer = generation_config.assistant_early_exit
    if threshold is not None:
        raise ValueError(
            f"exit_confidence={threshold} and assistant_early_exit={exit_layer}: all layers verify a draft; choose one"
        )
    check_exit("assistant_early_exit", exit_layer, num_hidden_layers)
    if generation_config.num_assistant_tokens < 1:
        raise ValueError(
            f"num_assistant_tokens={generation_config.num_assistant_tokens} drafts nothing; it must be at least 1"
        )
    # From 5.24 on, transformers leaves both to fail on the way.
    if not generation_config.use_cache:
        raise ValueError(f"assistant_early_exit={exit_layer} drafts on the shared cache: use_cache=True is missing")
    if "static" in str(generation_config.cache_implementation):
        raise ValueError(f"assistant_early_exit={exit_layer}: Static caches cannot take a draft back")
    # transformers would warn and decode without drafts.
    if generation_config.num_beams > 1:
        raise ValueError(f"assistant_early_exit={exit_layer} drafts one text, num_beams={generation_config.num_beams}")


class EarlyExitDrafts(CandidateGenerator):
    """Draft tokens of the first layers of the model itself; transformers' assisted decoding verifies and accepts them.

    `generation_config` carries everything: `assistant_early_exit` (after how many layers a draft leaves),
    `num_assistant_tokens` (the longest draft), `assistant_confidence_threshold` (a draft ends with the first token that
    is less probable), and `num_assistant_tokens_schedule`, of which `heuristic` and `heuristic_transient` both adapt
    the length of drafts within this call.

    Args:
        model: [`ChorusForConditionalGeneration`].
    """

    requires_model_outputs = True
    model_kwargs_overrides: dict[str, Any] = {}

    def __init__(
        self, model: PreTrainedModel, generation_config: GenerationConfig, logits_processor: LogitsProcessorList
    ):
        self.model: Any = model
        self.config, self.logits_processor = generation_config, logits_processor
        self.exit_layer: int = generation_config.assistant_early_exit
        self.num_tokens = int(generation_config.num_assistant_tokens)

    def get_candidates(
        self, input_ids: Tensor, model_kwargs: dict[str, Any], is_first_iteration: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The text `(1, S)` with a draft at its end, and the draft's scores `(1, tokens, vocabulary)`. The prefill,
        which all layers compute, has no draft."""
        # A check yields one token more than the draft that it accepts.
        room = self.config.max_length - input_ids.shape[1] - 1
        if isinstance(model_kwargs.get(CACHE), StaticCache):
            raise ValueError(f"assistant_early_exit={self.exit_layer}: Static caches cannot take a draft back")
        if is_first_iteration or room < 1:
            return input_ids, None
        text, kwargs = input_ids, dict(model_kwargs)
        scores: list[Tensor] = []
        while len(scores) < min(self.num_tokens, room):
            scores.append(self._scores(text, kwargs))
            token, probability = self._choose(scores[-1])
            text = torch.cat((text, token.to(text.device)), dim=-1)
            if probability < (self.config.assistant_confidence_threshold or 0.0) or self._ends(token):
                break
        # transformers' own early exit runs a `generate` per draft, with its own prefill and cache. Here a draft appends
        # to the cache of the verification and takes its keys back: nothing is computed twice.
        for layer in model_kwargs[CACHE].layers[: self.exit_layer]:
            layer.crop(-len(scores))
        return text, torch.stack(scores, dim=1)

    def _scores(self, text: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Processed scores `(1, vocabulary)` of the next token at the exit; `kwargs` are brought up to date."""
        inputs = self.model.prepare_inputs_for_generation(text, next_sequence_length=1, **kwargs)
        outputs = self.model(**inputs, exit_layer=self.exit_layer)
        self.model._update_model_kwargs_for_generation(outputs, kwargs)
        # A copy, as in transformers: processors may write in place, and a view would keep all logits alive.
        return self.logits_processor(text, outputs.logits[:, -1].to(text.device, torch.float32, copy=True))

    def _choose(self, scores: Tensor) -> tuple[Tensor, float]:
        """A token `(1, 1)` and its probability."""
        probabilities = scores.softmax(dim=-1)
        # Drawn from the very scores that are returned, or accepting drafts would change the distribution (arXiv
        # 2211.17192).
        token = torch.multinomial(probabilities, 1) if self.config.do_sample else scores.argmax(dim=-1, keepdim=True)
        return token, probabilities.gather(1, token).item()

    def _ends(self, token: Tensor) -> bool:
        ends = self.config._eos_token_tensor
        return ends is not None and bool(torch.isin(token, ends.to(token.device)))

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Longer drafts after a draft that was taken whole, shorter ones after any other."""
        if not self.config.num_assistant_tokens_schedule.startswith("heuristic"):
            return
        # Steps of transformers' own heuristic; its scores hold one position more than the draft.
        num_drafted = scores.shape[1] - 1
        self.num_tokens = self.num_tokens + 2 if num_matches == num_drafted else max(1, self.num_tokens - 1)


SERVICES["check_drafts"] = check_drafts
SERVICES["draft_with_first_layers"] = EarlyExitDrafts
