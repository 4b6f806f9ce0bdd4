"""What heads, units and layers are worth on rows with labels, the `scores` of `prune_dense`.

- A unit: how much the loss would change without it, to first order: `|sum of weight times gradient|` over all its
  weights, summed over batches (Molchanov et al. 2019, arXiv 1906.10771; LLM-Pruner, arXiv 2305.11627).
- A layer: how much it turns what passes through it, `1 - cos(input, output)`, a mean over real tokens (ShortGPT, arXiv
  2403.03853).

Shape suffixes: B batch, S sequence, D hidden size.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chorus_moe.surgery.dense_groups import LAYERS, groups_of, owners_of, scores_of, tower_layers
from chorus_moe.surgery.report import refuse_adapters

Scores = dict[str, dict[str, Tensor]]


def measure_importance(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> Scores:
    """The scores of every group that `prune_dense` knows for this model, layers of decoder and towers included.

    The model runs in evaluation, so that dropout and noise say nothing; its weights, gradients and mode stay.

    Args:
        batches: of `ChorusDataCollator`, with labels.

    Raises:
        ValueError: adapters are active, there are no batches, or a loss is not finite.
    """
    refuse_adapters(model, "measure_importance")
    inner: Any = getattr(model, "model", model)
    owners = owners_of(inner)
    groups = {name: (owner, group) for owner in owners for name, group in groups_of(inner.config, owner, owners[owner])}
    units: Scores = {name: {} for name in groups}
    was_training, flags = model.training, [parameter.requires_grad for parameter in model.parameters()]
    held = [parameter.grad for parameter in model.parameters()]
    device, count = next(model.parameters()).device, 0
    with ExitStack() as stack:
        stack.callback(_restore, model, was_training, flags, held)
        model.eval().requires_grad_(True)
        lists = layer_lists(owners)
        influence = {name: stack.enter_context(LayerInfluence(layers)) for name, layers in lists.items()}
        for count, batch in enumerate(batches, start=1):
            model.zero_grad(set_to_none=True)
            influence[LAYERS].is_real_BS = batch["attention_mask"].bool()
            loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
            if not torch.isfinite(loss):
                raise ValueError(f"measure_importance: the loss of batch {count - 1} is {loss.item()}")
            loss.backward()
            for owner, module in owners.items():
                values = {
                    name: torch.zeros_like(parameter) if parameter.grad is None else parameter.detach() * parameter.grad
                    for name, parameter in module.named_parameters()
                }
                for name in (name for name, (of, _) in groups.items() if of == owner):
                    for key, score in scores_of(values, groups[name][1]).items():
                        units[name][key] = units[name].get(key, torch.zeros_like(score)) + score.abs()
        if count == 0:
            raise ValueError("measure_importance: there are no batches")
        return units | {name: {"": found.mean()} for name, found in influence.items()}


class LayerInfluence:
    """How much each of some layers turns what passes through it, in every forward within a `with` block.

    Args:
        is_real_BS: bool, of the next forward; None takes what is not all zero, as padding of a tower is.
    """

    def __init__(self, layers: Iterable[nn.Module]):
        self.layers = list(layers)
        self.is_real_BS: Tensor | None = None
        self.sums = torch.zeros(len(self.layers), dtype=torch.float64)
        self.counts = torch.zeros(len(self.layers), dtype=torch.float64)
        self._handles: list[Any] = []

    def __enter__(self) -> "LayerInfluence":
        for index, layer in enumerate(self.layers):
            self._handles.append(layer.register_forward_hook(self._reader(index), with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def mean(self) -> Tensor:
        """`(layers,)`, 0 of a layer that never ran."""
        return self.sums / self.counts.clamp(min=1)

    def _reader(self, index: int) -> Any:
        def read(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            before = (inputs[0] if inputs else named["hidden_states"]).detach().double()
            after = (output[0] if isinstance(output, tuple) else output).detach().double()
            turned = 1 - F.cosine_similarity(before, after, dim=-1)
            is_real = before.abs().sum(dim=-1) > 0
            if self.is_real_BS is not None:
                # Global tokens stand in front of a bidirectional sequence.
                turned = turned[:, -self.is_real_BS.shape[1] :]
                is_real = self.is_real_BS.to(turned.device)
            self.sums[index] += turned[is_real].sum().cpu()
            self.counts[index] += is_real.sum().cpu()

        return read


def layer_lists(owners: Mapping[str, nn.Module]) -> dict[str, list[nn.Module]]:
    """Name -> the layers of the decoder and of towers."""
    decoder: Any = owners["language_model"]
    found: dict[str, list[nn.Module]] = {LAYERS: list(decoder.layers)}
    for owner, tower in owners.items():
        config: Any = tower.config
        if owner != "language_model" and (name := tower_layers(tower, config)) is not None:
            found[f"{owner}.{LAYERS}"] = list(tower.get_submodule(name).children())
    return found


def _restore(model: nn.Module, was_training: bool, flags: list[bool], held: list[Tensor | None]) -> None:
    model.train(was_training)
    for parameter, flag, gradient in zip(model.parameters(), flags, held, strict=True):
        parameter.requires_grad_(flag)
        parameter.grad = gradient
