"""Counts of parameters, total and active, against published shapes and against a count by hand."""

import time

import pytest

from chorus_moe import ChorusConfig, ChorusForConditionalGeneration
from chorus_moe.surgery import parameter_report
from tests.conftest import tiny_config


@pytest.mark.timeout(60)
def test_the_published_shape_of_671_billion_has_37_billion_active() -> None:
    # The shape of DeepSeek-V3 (arXiv 2412.19437), with grouped-query attention of like size in place of its own.
    config = ChorusConfig(
        text_config={
            "vocab_size": 129_280,
            "hidden_size": 7_168,
            "intermediate_size": 18_432,
            "num_hidden_layers": 61,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58,
            "cross_modal_layers": [],
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2_048,
            "shared_expert_intermediate_size": 2_048,
            "expert_banks": {"common": {}},
        }
    )
    start = time.monotonic()
    report = parameter_report(config)
    # Measured: under a second when the processor is idle; nothing of the 671 billion is allocated.
    assert time.monotonic() - start < 30
    assert report.total == pytest.approx(671e9, rel=0.01)
    assert report.active["text"] == pytest.approx(37e9, rel=0.01)


def test_the_report_equals_a_count_by_hand() -> None:
    report = parameter_report(tiny_config())
    width, vocab, sparse = 64, 128, 2
    queries, keys = width * width, width * 32
    expert = 3 * width * 32
    bank = {"total": sparse * (4 * width + 4 * expert), "active": sparse * (4 * width + 2 * expert)}
    ordinary, cross_modal = 2 * queries + 2 * keys, 2 * queries + 3 * 2 * keys
    assert report.banks == dict.fromkeys(["audio", "common", "image", "text"], bank)
    assert report.parts["embeddings"] == report.parts["heads"] == vocab * width
    assert report.parts["attention"] == 2 * ordinary + cross_modal
    assert report.parts["dense_mlp"] == 3 * width * 96
    assert report.parts["shared_experts"] == sparse * expert
    assert report.parts["bank_gates"] == sparse * 4 * width
    text = vocab * width + 3 * ordinary + 3 * width * 96 + sparse * (expert + 4 * width) + 2 * bank["active"]
    assert report.active["text"] == text + report.parts["norms"]


def test_the_parts_and_banks_sum_to_the_total_of_the_built_model() -> None:
    config = tiny_config()
    report = parameter_report(config)
    total = sum(parameter.numel() for parameter in ChorusForConditionalGeneration(config).parameters())
    assert report.total == total
    assert sum(report.parts.values()) + sum(bank["total"] for bank in report.banks.values()) == total


def test_every_router_counts_whole_for_each_token_of_its_bank() -> None:
    banks = {
        "text": {"router": "attention", "layers": [1]},
        "image": {"router": "sigmoid", "layers": [1]},
        "common": {},
    }
    report = parameter_report(tiny_config(expert_banks=banks))
    width, expert, inner = 64, 3 * 64 * 32, 64
    attention = inner * width + 2 * 4 * inner + 2 * (2 * inner * inner)
    assert report.banks["text"] == {"total": attention + 4 * expert, "active": attention + 2 * expert}
    assert report.banks["image"] == {"total": 4 * width + 4 * expert, "active": 4 * width + 2 * expert}


def test_an_encoder_is_active_for_its_own_modality_only() -> None:
    report = parameter_report(tiny_config())
    shared = report.active["text"]
    connectors = report.parts["connectors"]
    towers = report.parts["vision_tower"] + report.parts["audio_tower"]
    assert report.active["image"] + report.active["audio"] - 2 * shared == towers + connectors


def test_tied_embeddings_are_counted_once_and_are_active() -> None:
    tied, untied = tiny_config(tie_word_embeddings=True), tiny_config()
    tied.tie_word_embeddings = True
    assert parameter_report(untied).total - parameter_report(tied).total == 128 * 64
    assert parameter_report(tied).active["text"] == parameter_report(untied).active["text"]


def test_a_bank_of_some_layers_counts_in_those_layers() -> None:
    both = parameter_report(tiny_config(expert_banks={"common": {}, "text": {}}))
    upper = parameter_report(tiny_config(expert_banks={"common": {}, "text": {"layers": [2]}}))
    assert both.banks["text"]["total"] == 2 * upper.banks["text"]["total"]


def test_the_printed_report_names_every_bank_and_modality() -> None:
    text = str(parameter_report(tiny_config()))
    for word in ("total", "active for text", "active for image", "active for audio", "common"):
        assert word in text


def test_the_report_is_plain_data() -> None:
    report = parameter_report(tiny_config()).to_dict()
    assert set(report) == {"total", "active", "parts", "banks"}


def test_deep_experts_count_each_feed_forward_and_are_active_by_their_share() -> None:
    report = parameter_report(tiny_config(expert_banks={"common": {"expert_depth": 3}}))
    expert, router = 3 * 3 * 64 * 32, 4 * 64
    assert report.banks["common"] == {"total": 2 * (router + 4 * expert), "active": 2 * (router + 2 * expert)}
