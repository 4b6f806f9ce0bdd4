"""A stream of tokens whose routing is skewed, and Trainers on it; `test_routing_callback.py` says what is claimed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.modeling.moe_routers import Router
from chorus_moe.training.recipe import TRAINER_SETTINGS
from tests.conftest import tiny_config

BIASED: dict[str, Any] = {"common": {"balance": "bias", "bias_update_rate": 0.02, "num_experts_per_tok": 1}}


def skewed_model(**text: Any) -> ChorusForConditionalGeneration:
    """A model whose routers prefer expert 0 for almost every token of `token_rows`."""
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(**{"expert_banks": BIASED, **text}))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Router):
                module.weight.mul_(8)
                module.weight[0] += 0.05
        model.model.language_model.embed_tokens.weight.add_(0.02)
    return model


def rewarded_model() -> ChorusForConditionalGeneration:
    """The same, to be rewarded instead of balanced."""
    return skewed_model(expert_banks={"common": {"balance": "none", "num_experts_per_tok": 1}})


def router_weights(model: nn.Module) -> list[list[float]]:
    return [module.weight.flatten().tolist() for module in model.modules() if isinstance(module, Router)]


def token_rows(count: int, length: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(5, 128, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in rows]


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def make_trainer(
    model: nn.Module, folder: Path, rows: list[dict[str, Tensor]], kind: Any = Trainer, **settings: Any
) -> Trainer:
    trainer_options = {name: settings.pop(name) for name in ("callbacks", "router_reward_banks", "router_reward_coef")
                       if name in settings}  # fmt: skip
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "no"}
    arguments = TrainingArguments(
        str(folder),
        **{"report_to": "none", "use_cpu": True, "disable_tqdm": True, **TRAINER_SETTINGS, **defaults, **settings},
    )
    return kind(model, arguments, data_collator=stack, train_dataset=rows, eval_dataset=rows[:4], **trainer_options)
