"""An observer of routing: hooks on a model's decoder that count what its experts do.

Unusual here:
- the decoder's output is read, not its layers: a layer that activation checkpointing runs twice counts once;
- the routing is recorded because the hooks ask for it; who calls the model sees no difference in its output;
- nothing is stored in the model, and nothing is left of the observer after `detach`.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from chorus_moe.surgery.parts import decoder_of
from chorus_moe.training.routing.counters import RoutingCounters


class RoutingObserver:
    """Counts the routing of every forward between `attach` and `detach`, or within a `with` block.

        with RoutingObserver(model) as observer:
            model.generate(**inputs)
        summarise(observer.counters)

    Padding is left out, and so are slots that a token does not use. Prompt and generated tokens count alike, each once,
    as the cache lets each pass once. With a static cache `generate` hands on masks that say nothing about padding,
    which is then counted; a compiled decoder is not observed.

    Args:
        model: any Chorus model, also below PEFT or DistributedDataParallel.
        training_only: count what has a gradient in training mode, so neither evaluation nor a baseline under `no_grad`.
    """

    def __init__(self, model: nn.Module, *, training_only: bool = False):
        self.decoder = decoder_of(model)
        self.training_only = training_only
        self.counters = RoutingCounters(self.decoder.config, next(self.decoder.parameters()).device)
        self._handles: list[RemovableHandle] = []
        self._was_asked = False

    def attach(self) -> "RoutingObserver":
        if not self._handles:
            self._handles = [
                self.decoder.register_forward_pre_hook(self._ask, with_kwargs=True),
                self.decoder.register_forward_hook(self._read, with_kwargs=True),
            ]
        return self

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "RoutingObserver":
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @property
    def _counts(self) -> bool:
        # Counting has side effects, which a compiled graph would drop or record once.
        if torch.compiler.is_compiling():
            return False
        return not self.training_only or (self.decoder.training and torch.is_grad_enabled())

    def _ask(
        self, _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._counts:
            return None
        asked = options.get("output_router_logits")
        # Remembered, so that the caller gets the routing if it asked for it and none otherwise.
        self._was_asked = bool(self.decoder.config.output_router_logits if asked is None else asked)
        return arguments, {**options, "output_router_logits": True}

    def _read(self, _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
        if not self._counts or output.routing is None:
            return None
        modality_BS = options.get("mm_token_type_ids")
        self.counters.count(output.routing, None if modality_BS is None else modality_BS.reshape(-1))
        # Who did not ask for the routing does not get it.
        if not self._was_asked:
            output.routing = None
        return output
