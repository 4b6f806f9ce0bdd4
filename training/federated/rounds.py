"""The server: asks all clients, checks what they send, joins it, and keeps what it holds on disk.

Unusual here:
- it knows nothing of the network: `FlowerServer` carries questions and answers, `simulate.py` calls the clients;
- an answer that is not whole, not finite or not of this round is left out with its reason, and no answer can stop the
  server. A round that too few answer in time is asked again, from the same weights;
- the file of the state takes the place of the last one when all of it is written, so a killed server goes on from its
  last round.
"""

import json
import os
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chorus_moe.surgery.parts import decoder_of
from chorus_moe.surgery.report import count_parameters
from chorus_moe.training.federated.arguments import FEDPROX, FederatedArguments, check_federated, epsilon
from chorus_moe.training.federated.exchange import Exchange
from chorus_moe.training.federated.joining import Joined, join, pairs_of, rest_share, sides
from chorus_moe.training.federated.layout import (
    base_of,
    freeze_lora_a,
    layout_of,
    trained_tensors,
    write_weights,
)
from chorus_moe.training.federated.masked_sums import join_mean
from chorus_moe.training.federated.updates import STOP, TRAIN, Question, Update, pack, unpack
from chorus_moe.training.recipe import read_mapping
from chorus_moe.training.saving import put_on_disk

STATE = "federated.safetensors"
# Seconds between two looks for clients.
PAUSE = 0.5
GROUPS = ("weights", "rest_a", "rest_b", "first", "second")


@dataclass(frozen=True)
class Round:
    """What one round was.

    Attributes:
        clients: name -> examples, norm of the change and what it was multiplied by.
        refused: name -> why its answer was left out.
        bytes_out, bytes_in: of all questions, of all answers.
        rest: share of the LoRA products that the rank leaves out, see `joining.py`.
        spent: name -> epsilon and delta that a private client says it has spent so far.
        epsilon: spent so far; None without noise.
        masked: names of those whose changes came masked, of which nothing else is known; `clients` is empty then.
        norm: of the mean of masked changes.
    """

    number: int
    clients: dict[str, tuple[int, float, float]]
    refused: dict[str, str]
    bytes_out: int
    bytes_in: int
    seconds: float
    rest: float = 0.0
    epsilon: float | None = None
    spent: dict[str, list[float]] = field(default_factory=dict)
    masked: list[str] = field(default_factory=list)
    norm: float | None = None

    @property
    def names(self) -> list[str]:
        """Of those whose changes are in the new weights."""
        return [*self.clients, *self.masked]

    def __str__(self) -> str:
        found = [
            f"{name} {examples:,} examples, change {norm:.3g}"
            + (f" x {scale:.2g}" if scale < 1 else "")
            + self._spent(name)
            for name, (examples, norm, scale) in self.clients.items()
        ]
        found += [f"{name} masked{self._spent(name)}" for name in self.masked]
        if self.norm is not None:
            found.append(f"mean of the masked changes {self.norm:.3g}")
        found += [f"{name} left out: {reason}" for name, reason in self.refused.items()]
        spent = "" if self.epsilon is None else f"; epsilon {self.epsilon:.3g}"
        return f"round {self.number}: {'; '.join(found)}; {self.bytes_in:,} bytes received{spent}"

    def _spent(self, name: str) -> str:
        return f", epsilon {self.spent[name][0]:.3g} of its rows" if name in self.spent else ""


@dataclass
class Federation:
    """A federation's server.

    Args:
        model: the model below, with the adapter or the parts that are trained together.
        given: the section `federated` of the recipe.
        folder: where the state lies; one that is there is taken up.

    Raises:
        ValueError: settings that cannot be, or the state of another base or of other tensors (with both).
    """

    model: nn.Module
    given: FederatedArguments
    folder: Path
    history: list[Round] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_federated(self.given)
        # First, as the A that nobody trains is sent all the same: everyone starts from one.
        everything = trained_tensors(self.model)
        if not self.given.train_lora_a:
            freeze_lora_a(self.model)
        self.layout = layout_of(self.model)
        if self.given.client_noise and pairs_of(self.layout):
            raise ValueError(
                "federated.client_noise on both matrices of a LoRA has no bound: set federated.train_lora_a to false"
            )
        if self.given.secure_aggregation and pairs_of(self.layout):
            raise ValueError(
                "federated.secure_aggregation: the mean product of a LoRA is made of each client's own two matrices, "
                "which no sum holds: set federated.train_lora_a to false"
            )
        self.fixed = {name: tensor.clone() for name, tensor in everything.items() if name not in self.layout}
        self.base = base_of(self.model, everything)
        config = decoder_of(self.model).config
        self.experts = {
            (layer, bank.name): bank.num_experts
            for layer in config.sparse_layers
            for bank in config.banks_of_layer(layer)
        }
        self.owners = read_mapping("federated.bank_owners", self.given.bank_owners, "{speech: clinic}") or {}
        self.held = Joined(
            {name: tensor.detach().clone().cpu() for name, tensor in trained_tensors(self.model).items()}
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / STATE).is_file():
            self._take_up()

    @property
    def done(self) -> int:
        """Rounds that are over."""
        return self.history[-1].number if self.history else 0

    def run(self, exchange: Exchange) -> None:
        """All rounds that are left, and the last word to the clients. The model has the weights then.

        Raises:
            ValueError: too many rounds in a row that too few clients answered.
        """
        failed = 0
        while self.done < self.given.rounds:
            found = self._round(exchange)
            print(found, file=sys.stderr, flush=True)
            failed = 0 if found.names else failed + 1
            if failed > self.given.max_failed_rounds:
                raise ValueError(
                    f"round {found.number} failed {failed} times: it needs {self.given.min_clients} answers within "
                    f"{self.given.round_seconds:g} s; the last time, {found.refused or 'none came'}"
                )
        exchange.ask(dict.fromkeys(exchange.clients(), Question(STOP).pack()), seconds=5.0)
        write_weights(self.model, self.held.weights | self.fixed)

    def _round(self, exchange: Exchange) -> Round:
        start, said = time.monotonic(), False
        while len(names := exchange.clients()) < self.given.min_clients:
            if not said:
                print(
                    f"waiting for {self.given.min_clients} clients, {len(names)} are there", file=sys.stderr, flush=True
                )
                said = True
            time.sleep(PAUSE)
        number = self.done + 1
        proximal = self.given.proximal_weight if self.given.aggregation == FEDPROX else 0.0
        weights = self.held.weights | self.fixed
        left = self.given.rounds - self.done
        question = Question(TRAIN, number, self.base, left, proximal, self.given.train_lora_a, weights).pack()
        if self.given.secure_aggregation:
            return self._masked_round(exchange, names, question, start)
        answers = exchange.ask(dict.fromkeys(names, question), self.given.round_seconds)
        updates: dict[str, Update] = {}
        refused: dict[str, str] = {}
        for name, answer in sorted(answers.items()):
            try:
                if isinstance(answer, str):
                    raise ValueError(answer)
                updates[name] = self.check(name, Update.unpack(answer))
            # Bytes from outside: whatever they do to the reader must not stop the round.
            except Exception as error:
                refused[name] = f"{error}"
        out, back = (
            len(question) * len(names),
            sum(len(found) for found in answers.values() if isinstance(found, bytes)),
        )
        seconds = time.monotonic() - start
        if len(updates) < self.given.min_clients:
            lacking = f"{len(updates)} of {self.given.min_clients} answers that the round needs"
            refused |= dict.fromkeys(updates, f"the round is asked again, with {lacking}")
            return Round(number, {}, refused, out, back, seconds)
        self.held, norms, scales = join(
            self.held, list(updates.values()), self.layout, self.given, len(names), _noise_source()
        )
        clients = {
            name: (update.examples, norm, scale)
            for (name, update), norm, scale in zip(updates.items(), norms, scales, strict=True)
        }
        rest = rest_share(self.held, self.layout)
        told = {name: update.spent for name, update in updates.items() if update.spent is not None}
        return self._keep(Round(number, clients, refused, out, back, seconds, rest, self._epsilon(number), told))

    def _masked_round(self, exchange: Exchange, names: list[str], question: bytes, start: float) -> Round:
        from chorus_moe.training.federated.secure_server import ask_masked

        number = self.done + 1
        found = ask_masked(exchange, names, question, self.given, self.layout, number)
        sizes = found.bytes_out, found.bytes_in
        if found.mean is None:
            return Round(number, {}, found.refused, *sizes, time.monotonic() - start)
        self.held = join_mean(self.held, found.mean, self.layout, self.given, len(names), _noise_source())
        known: dict[str, Any] = {"spent": found.spent, "masked": found.clients, "norm": found.mean.norm}
        seconds = time.monotonic() - start
        return self._keep(Round(number, {}, found.refused, *sizes, seconds, epsilon=self._epsilon(number), **known))

    def _epsilon(self, rounds: int) -> float | None:
        noise = self.given.client_noise
        return epsilon(noise, rounds, self.given.client_delta) if noise else None

    def _keep(self, found: Round) -> Round:
        self.history.append(found)
        self.save()
        return found

    def check(self, name: str, update: Update) -> Update:
        """An update that fits.

        Raises:
            ValueError: it is of another round or base, counts what cannot be, changes another client's bank, or a
                tensor has another shape or holds a value that is not finite.
        """
        if update.base != self.base:
            raise ValueError(f"trained on top of sha256 {update.base}, this federation on {self.base}")
        if update.round != self.done + 1:
            raise ValueError(f"an update of round {update.round}, this is round {self.done + 1}")
        if type(update.examples) is not int or update.examples < 1:
            raise ValueError(f"{update.examples!r} examples")
        spent = [0.0, 0.0] if update.spent is None else update.spent
        if len(spent) != 2 or not all(type(value) is float and value >= 0 for value in spent):
            raise ValueError(f"has spent {spent!r}, which is no epsilon and delta")
        for place, chosen_E in update.tokens.items():
            if chosen_E.dtype != torch.int64 or (chosen_E < 0).any():
                raise ValueError(f"tokens of bank {place[1]!r} in layer {place[0]}: {chosen_E.tolist()}")
        for tensor, value in sorted(update.weights.items()):
            if tensor not in self.layout:
                raise ValueError(f"{tensor} is not trained in this federation")
            self._check_tensor(name, tensor, value, update)
        for pair in pairs_of(self.layout):
            sent = [side for side in sides(pair) if side in update.weights]
            if len(sent) == 1:
                raise ValueError(f"{sent[0]} came without the other matrix of the LoRA")
        if not update.weights:
            raise ValueError("nothing was trained: no token of these rows reaches what the federation trains")
        return update

    def _check_tensor(self, name: str, tensor: str, value: Tensor, update: Update) -> None:
        known = self.layout[tensor]
        if tuple(value.shape) != known.shape:
            raise ValueError(f"{tensor} has shape {tuple(value.shape)}, this federation's has {known.shape}")
        if not value.is_floating_point() or not value.float().isfinite().all():
            raise ValueError(f"{tensor} holds values that are not finite numbers")
        if known.place is None:
            return
        layer, bank = known.place
        if (owner := self.owners.get(bank, name)) != name:
            raise ValueError(f"{tensor}: bank {bank!r} is {owner}'s alone")
        if update.is_private:
            return
        counts = update.tokens.get(known.place)
        wanted = self.experts[known.place]
        if counts is None or tuple(counts.shape) != (wanted,):
            raise ValueError(f"{tensor}: no count of tokens for each expert of bank {bank!r} in layer {layer}")

    def save(self) -> None:
        """Write the state; it takes the place of the last one when it is whole and on disk."""
        facts = {"base": self.base, "history": [asdict(found) for found in self.history]}
        groups = {f"{name}/": getattr(self.held, name) for name in GROUPS}
        path, aside = self.folder / STATE, self.folder / f"{STATE}.new"
        aside.write_bytes(pack(groups, facts))
        put_on_disk(aside)
        os.replace(aside, path)
        text = json.dumps(facts["history"], indent=2)
        (self.folder / "rounds.json").write_text(text + "\n", encoding="utf-8")

    def _take_up(self) -> None:
        path = self.folder / STATE
        groups, facts = unpack(path.read_bytes())
        if facts["base"] != self.base:
            raise ValueError(f"{path} was trained on top of sha256 {facts['base']}, this model has {self.base} below")
        found = Joined(**{name: groups.get(f"{name}/", {}) for name in GROUPS})
        shapes = {name: tuple(tensor.shape) for name, tensor in found.weights.items()}
        if shapes != {name: tensors.shape for name, tensors in self.layout.items()}:
            raise ValueError(
                f"{path} holds {len(shapes)} trained tensors, this recipe trains {len(self.layout)} others; "
                "choose another output_dir"
            )
        self.held = found
        self.history = [Round(**{**entry, "clients": _tuples(entry["clients"])}) for entry in facts["history"]]
        print(f"the federation goes on after round {self.done}", file=sys.stderr)


def _noise_source() -> torch.Generator:
    """From the operating system: a seed that can be guessed would take the noise away again."""
    return torch.Generator().manual_seed(secrets.randbits(63))


def _tuples(clients: Mapping[str, list[float]]) -> dict[str, tuple[int, float, float]]:
    return {name: (int(examples), norm, scale) for name, (examples, norm, scale) in clients.items()}


def sent_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of a round's weights in one direction: what is trained, and the whole model."""
    trained = trained_tensors(model)
    whole = count_parameters(model)
    size = next(iter(trained.values())).element_size()
    return {"trained": sum(t.numel() * t.element_size() for t in trained.values()), "model": whole * size}
