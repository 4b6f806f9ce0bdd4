"""Every benchmark runs and writes figures; how fast anything is, no test says."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    adaptive_experts,
    against,
    alignment,
    compression,
    decode,
    deep_experts,
    distillation,
    draft_and_verify,
    early_exit,
    feature_cache,
    federated,
    gpu_layers,
    layer_skip,
    lifelong,
    long_context,
    memory_tokens,
    moe_vs_dense,
    multitask,
    owned_banks,
    privacy,
    process_memory,
    prune_merge,
    router_reward,
    routing_options,
    scaling,
    self_supervised,
    serving,
    sparse_layer,
    timing,
    token_exit,
    train_step,
    upcycle,
)

EXPECTED = {
    sparse_layer: {"grouped_mm_ratio", "eager_ratio", "qwen3_omni_ratio", "dense_active_ratio", "ernie_vl_ratio",
                   "ernie_masks_ratio", "products_ratio", "reading_ratio", "chorus_ms", "chorus_mib"},
    train_step: {"qwen3_omni_ratio", "ernie_vl_ratio", "dense_active_ratio", "with_balance_ratio", "chorus_mib"},
    self_supervised: {"first_loss", "last_loss", "learning_s", "none_accuracy", "pretrained_accuracy", "labels"},
    router_reward: {"accuracy", "loss", "load_entropy", "strongest_share", "expert_bits", "train_seconds"},
    scaling: {"loss_difference", "share_of_model", "speed_tokens/s"},
    process_memory: {"own_mib", "read_mib", "read_over_own", "share", "step_mib"},
    decode: {"qwen3_moe_ratio", "dense_active_ratio", "of_bound_ratio", "chorus_tokens_per_second", "chorus_ms"},
    compression: {"bytes_ratio_int8", "bytes_ratio_int4", "accuracy_drop_int8", "accuracy_drop_int4",
                  "decode_ratio_int8", "prefill_ratio_int8"},
    routing_options: {f"{name}_ratio" for name in routing_options.OPTIONS} - {"chorus_ratio"}
    | {"chorus_ms", "sampled_spread_ratio"},
    adaptive_experts: {"adaptive_simple_ratio", "adaptive_mixed_used", "adaptive_experts", "half_accuracy",
                       "chorus_mflops", "adaptive_loss", "mean_1.5_experts", "top_p_40_right", "mean_2_spread"},
    alignment: {"chorus_accuracy", "log_odds_entropy", "maps_distance", "contrastive_retrieval", "pooled_on_place"},
    deep_experts: {"chorus_active", "depth_2_loss", "depth_3_right", "depth_2_ratio", "chorus_ms", "nested_0.5_active",
                   "narrow_0.25_loss", "nested_1_spread"},
    token_exit: {"chorus_tokens_per_second", "exit_95_depth", "exit_80_changed", "drafts_right", "calibrated_changed",
                 "found_confidence"},
    gpu_layers: {"qwen3_moe_ratio", "grouped_mm_ratio", "batched_mm_ratio", "dense_active_ratio", "ernie_masks_ratio",
                 "flash_ratio", "dense_mask_ratio", "chorus_ms", "chorus_mib"},
    early_exit: {"left_in_first_5", "went_deep", "time_saving_ratio", "compute_saving_ratio", "accuracy_drop",
                 "threshold", "easy_left_in_first_5", "hard_left_in_first_5", "went_deep_spread"},
    feature_cache: {"media_ratio", "chorus_ms", "cache_ms", "epochs_to_even", "row_kib", "difference"},
    federated: {"alone", "federated", "together", "alone_accuracy", "model", "bank", "one_side"},
    long_context: {"speedup_ratio", "memory_saving", "growth_ratio", "materialised_speedup_ratio", "flash_ratio",
                   "equal_active_speedup_ratio", "windows_accuracy", "globals_accuracy", "full_layer_accuracy",
                   "cross_layer_accuracy", "chorus_accuracy", "full_accuracy", "masked_ratio", "masked_growth"},
    lifelong: {"all_accuracy", "full_lost", "chorus_lost", "chorus_rehearsed_accuracy", "chorus_sound_lost",
               "chorus_identical", "chorus_gate", "full_parameters"},
    draft_and_verify: {"chorus_tokens_per_second", "plain_ratio", "accepted", "per_check", "trained_loss"},
    memory_tokens: {"windows_accuracy", "globals_accuracy", "memory_accuracy", "full_accuracy", "memory_ms",
                    "memory_mib", "memory_growth", "full_growth"},
    layer_skip: {"layer_50_ratio", "layer_50_flops", "layer_50_right", "skip_50_flops", "skip_50_ratio", "skip_50_open",
                 "skip_50_right", "skip_50_loss", "chorus_tokens_per_second", "chorus_ms"},
    moe_vs_dense: {"dense_ratio", "dense_total", "equal_active_active", "chorus_mflops", "equal_active_accuracy",
                   "dense_loss", "chorus_ms"},
    distillation: {"active_share", "alone_ratio", "chorus_ms", "teacher_accuracy", "alone_accuracy", "chorus_accuracy",
                   "chorus_loss", "states_loss"},
    privacy: {"accuracy_at_epsilon_8", "accuracy_at_epsilon_1", "plain_accuracy", "laplace_8_accuracy", "canary_rank",
              "members_auc", "plain_ratio", "chorus_mib"},
    owned_banks: {"base_accuracy", "pictures_accuracy", "gates_accuracy", "withdrawn_accuracy", "together_accuracy",
                  "bank_bytes"},
    multitask: {"digit_accuracy", "holes_accuracy", "mean_accuracy", "seconds", "cosine"},
    serving: {"requests_lost", "answers_mixed_up", "tokens_per_second", "p50_ms", "p99_ms", "first_word_p50_ms"},
    upcycle: {"copy_ratio", "copy_parent_ratio", "peak_of_parent_ratio", "build_of_child_ratio", "chorus_ms"},
    prune_merge: {"chorus_parameters", "use_parameters", "merge_ratio", "use_accuracy", "saliency_accuracy",
                  "random_accuracy", "merge_accuracy", "chorus_accuracy", "merge_loss"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _restore_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("program", EXPECTED, ids=lambda program: program.__name__)
def test_a_quick_run_writes_finite_figures(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if program is privacy:
        pytest.importorskip("opacus", reason="opacus is not installed: .ci/matrix privacy has it")
    path = tmp_path / "figures.json"
    program.main(["--quick", "--threads", "1", "--json", str(path)])
    written = json.loads(path.read_text(encoding="utf-8"))
    figures = [item for case in written["cases"].values() for item in case.items()]
    assert EXPECTED[program] <= {key for key, _ in figures}
    assert all(math.isfinite(value) for _, value in figures)
    assert all(case in capsys.readouterr().out for case in list(written["cases"])[:1])
    assert written["machine"]["threads"] == 1


def test_another_checkout_runs_our_program_on_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has no benchmarks, and its package says that it was the one imported."""
    checkout, names = tmp_path / "checkout", tmp_path / "names"
    (checkout / "chorus_moe").mkdir(parents=True)
    (checkout / "chorus_moe" / "__init__.py").write_text("raise SystemExit('the code of the other checkout')\n")
    names.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(names))
    with pytest.raises(subprocess.CalledProcessError) as raised:
        against.run(checkout, "sparse_layer", ["--quick"])
    assert "the code of the other checkout" in raised.value.stderr
    # A module under another name is renamed by what `PYTHONPATH` held before.
    (names / "sitecustomize.py").write_text("raise SystemExit('renames')\n")
    with pytest.raises(subprocess.CalledProcessError) as raised:
        against.run(checkout, "sparse_layer", ["--quick"])
    assert "renames" in raised.value.stderr


def test_peak_memory_counts_what_is_freed_within_the_call() -> None:
    def call() -> torch.Tensor:
        large = torch.ones(4 * 2**20 // 4)
        return large[:8].clone()

    assert timing.peak_mib(call) == pytest.approx(4, rel=0.01)


def test_a_ratio_is_formed_within_each_round() -> None:
    ours = timing.Timing(2.0, [1.0, 2.0, 4.0], None)
    other = timing.Timing(6.0, [3.0, 6.0, 12.0], None)
    assert timing.ratio(other, ours) == 3


def test_the_replay_of_sampled_routing_visits_the_experts_that_were_drawn() -> None:
    hidden = torch.randn(1, 2, routing_options.QUICK["hidden_size"])
    plain, sampled = (
        routing_options.Variant(routing_options.OPTIONS[name], routing_options.QUICK, hidden, None)
        for name in (routing_options.OURS, routing_options.SAMPLED)
    )

    def visited(call: Any) -> list[Any]:
        return [call()[1][routing_options.BANK].selected_experts.tolist() for _ in range(routing_options.DRAWS)]

    torch.manual_seed(0)
    replayed = visited(plain.replay(sampled))
    torch.manual_seed(0)
    assert replayed == visited(sampled.forward())
