"""Add a modality to a model that was built without it: encoder, connector, placeholder token, bank.

Unusual here: modules and configuration end in the order of a model built with the modality, so names, parameters and
the states of an optimizer agree with those of the saved and reloaded model.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from chorus_moe.modeling.attention import ModalityProjection
from chorus_moe.modeling.configuration_banks import ExpertBankConfig, check_name
from chorus_moe.modeling.configuration_chorus import ChorusConfig
from chorus_moe.modeling.configuration_modalities import ENCODED, ENCODED_MODALITIES, MODALITY_IDS, in_order
from chorus_moe.modeling.modeling_base import ChorusPreTrainedModel
from chorus_moe.modeling.modeling_chorus import ENCODER_CLASSES
from chorus_moe.surgery.banks import add_bank, write_bank
from chorus_moe.surgery.parts import decoder_of
from chorus_moe.surgery.report import OperationReport, checked, count_parameters, refuse_adapters

ORDER = (*(row.tower for row in ENCODED), *(row.connector for row in ENCODED), "language_model")


def add_modality(
    model: ChorusPreTrainedModel,
    modality: str,
    tower: PreTrainedConfig | Mapping[str, Any] | nn.Module,
    token_id: int | None = None,
    bank: Mapping[str, Any] | None = None,
) -> OperationReport:
    """Add an encoder, its connector and its placeholder token. Outputs for other inputs stay as they are.

    The keys and values of the modality in the cross-modal layers start as those of text. A bank that takes all that
    the model has, and is not named after a modality, takes the new one, too.

    Args:
        modality: a name of `ENCODED_MODALITIES`, such as "image" or "audio".
        tower: a configuration of the encoder (object or dictionary), or a trained encoder.
        token_id: the placeholder. If None, the one that the configuration reserves (`compose` reserves one for every
            modality, which its processor knows), else a new token at the end of the vocabulary. A vocabulary that is
            too small grows by rows that are the mean of all rows.
        bank: settings of a bank for the modality, named after it. Without settings one is added if no bank takes
            the modality.

    Raises:
        ValueError: adapters are active, the model has that encoder or no place for one, the widths or the token do
            not fit.
    """
    refuse_adapters(model, "add_modality")
    check_name("add_modality", "modality", modality, ENCODED_MODALITIES)
    row = ENCODED_MODALITIES[modality]
    inner, config, before = _place_for_towers(model), model.config, count_parameters(model)
    if modality in config.modalities:
        raise ValueError(f"add_modality: the model already has {modality!r}; its modalities are {config.modalities}")
    tower_config = checked("add_modality", lambda: _read_tower(modality, tower))
    text, decoder = config.text_config, decoder_of(model)
    if token_id is None:
        reserved = getattr(config, row.token_id)
        token_id = text.vocab_size if reserved is None else reserved
    vocab_size = max(text.vocab_size, token_id + 1)
    old = list(text.modalities)
    new = in_order({*old, modality})
    changes = {row.config: tower_config, row.token_id: token_id}
    values = config.to_dict()
    values |= changes | {"text_config": {**values["text_config"], "vocab_size": vocab_size, "modalities": new}}
    checked("add_modality", lambda: type(config)(**values))

    # A norm is never quantised, so its dtype is the one the model computes in.
    like = decoder.norm.weight
    classes = ENCODER_CLASSES[tower_config.model_type]
    built = tower if isinstance(tower, nn.Module) else classes[0]._from_config(tower_config)
    connector = classes[1](tower_config, text.hidden_size)
    for part in connector.modules():
        inner._init_weights(part)
    notes, experts = [f"placeholder token {token_id}"], {}
    opened = [
        found
        for found in decoder.banks.values()
        if set(old) <= set(found.modalities) and modality not in found.modalities and found.name not in MODALITY_IDS
    ]
    text.modalities = new
    if bank is not None or not (opened or any(modality in found.modalities for found in decoder.banks.values())):
        settings = dict(bank or {})
        name, modalities = settings.pop("name", modality), settings.pop("modalities", [modality])
        try:
            experts = add_bank(model, name, modalities, **settings).experts
        except ValueError:
            text.modalities = old
            raise
    for found in opened:
        notes.append(f"bank {found.name!r} takes it")
        _open_bank(decoder, found, modality)
    if vocab_size > text.vocab_size:
        notes.append(f"vocabulary {text.vocab_size} -> {vocab_size} tokens")
        _grow_vocabulary(model, vocab_size)

    _attach(inner, row.tower, built.to(like.device, like.dtype).train(inner.training))
    _attach(inner, row.connector, connector.to(like.device, like.dtype).train(inner.training))
    for name, value in changes.items():
        setattr(config, name, value)
    _start_like_text(decoder, modality)
    _adapt_head(model, modality, token_id)
    return OperationReport(
        operation="add_modality",
        subject=modality,
        parameters_before=before,
        parameters_after=count_parameters(model),
        experts=experts,
        notes=notes,
    )


def _place_for_towers(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "audio_tower") and hasattr(module, "language_model"):
            return module
    raise ValueError(
        f"add_modality: {type(model).__name__} has no place for an encoder; use a model with all its parts"
    )


def _read_tower(modality: str, tower: Any) -> Any:
    """The configuration of an encoder that is given as one, as a dictionary or ready.

    Raises:
        ValueError: an encoder of another modality, or none.
    """
    wanted_class = ChorusConfig.sub_configs[ENCODED_MODALITIES[modality].config]
    if isinstance(tower, Mapping):
        return wanted_class(**tower)
    config = getattr(tower, "config", tower)
    wanted, found = wanted_class.model_type, getattr(config, "model_type", type(tower).__name__)
    if found != wanted or (isinstance(tower, nn.Module) and not hasattr(tower, "smallest_input")):
        raise ValueError(f"add_modality: an encoder for {modality!r} is of type {wanted!r}, found {found!r}")
    return config


def _open_bank(decoder: Any, bank: ExpertBankConfig, modality: str) -> None:
    """Let tokens of a modality enter a bank. For other tokens the open banks stay the same."""
    bank = replace(bank, modalities=in_order({*bank.modalities, modality}))
    write_bank(decoder, bank)
    for layer in bank.layers_among(decoder.config.sparse_layers):
        mlp = decoder.layers[layer].mlp
        mlp.banks[bank.name].modalities = bank.modalities
        gate = mlp.bank_gate
        gate.banks = [found for found in decoder.config.banks_of_layer(layer) if not found.has_own_gate]
        gate.is_open = gate.open_table().to(gate.is_open.device)


def _attach(inner: nn.Module, name: str, module: nn.Module) -> None:
    setattr(inner, name, module)
    # `setattr` appends. The order of a model built with the modality decides the numbers by which an optimizer state
    # knows parameters.
    modules = {found: inner._modules.pop(found) for found in ORDER if found in inner._modules}
    inner._modules.update(modules)


@torch.no_grad()
def _grow_vocabulary(model: Any, vocab_size: int) -> None:
    """New rows of the embedding and of the head are the mean of the old ones: the placeholder is an unlikely word."""
    old = model.get_input_embeddings().num_embeddings
    # The resized tables may be new parameters, which are trained: a table that was frozen stays frozen.
    trained = [table.weight.requires_grad for table in _tables(model)]
    # transformers' own mean resizing draws from a normal distribution around the mean. Here the rows are the mean
    # itself, drawn from nothing.
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for table, is_trained in zip(_tables(model), trained, strict=True):
        table.weight[old:] = table.weight[:old].mean(dim=0)
        table.weight.requires_grad_(is_trained)


def _tables(model: Any) -> list[Any]:
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    return [table for table in tables if table is not None]


def _start_like_text(decoder: Any, modality: str) -> None:
    for layer in decoder.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            if not isinstance(projection, ModalityProjection):
                continue
            if modality in projection:  # a model that was saved with parts for every modality
                projection[modality].load_state_dict(projection["text"].state_dict())
                continue
            projection[modality] = deepcopy(projection["text"])
            for parameter in projection[modality].parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            projection._modules = {name: projection._modules[name] for name in in_order(list(projection))}


def _adapt_head(model: Any, modality: str, token_id: int) -> None:
    """Generation never produces the placeholder; the contrastive head gets a projection for the modality."""
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        suppressed = model.generation_config.suppress_tokens or []
        model.generation_config.suppress_tokens = sorted({*suppressed, token_id})
    projections = getattr(model, "projections", None)
    if projections is not None:
        like = projections["text"]
        new = nn.Linear(like.in_features, like.out_features, bias=False).to(like.weight.device, like.weight.dtype)
        model._init_weights(new)
        # In the order of the configuration, as in a model built with the modality.
        found = {**projections, modality: new}
        model.projections = nn.ModuleDict({name: found[name] for name in model.config.modalities})
