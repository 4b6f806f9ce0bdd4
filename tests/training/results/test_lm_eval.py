"""lm-eval takes a saved model by its path and asks it what we would; `.ci/matrix harness` installs lm-eval."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor

pytest.importorskip("lm_eval")

CHOICES = ["three", "four"]


def test_lm_eval_scores_a_model_by_its_path(
    model: ChorusForConditionalGeneration, processor: ChorusProcessor, tmp_path: Path
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    rows = [{"question": "what is it?", "choices": CHOICES, "label": 0}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(task))

    harness = HFLM(pretrained=str(tmp_path / "model"), device="cpu")
    assert isinstance(harness.model, ChorusForConditionalGeneration)
    found = simple_evaluate(
        harness,
        tasks=["local"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )

    scores = []
    for choice in CHOICES:
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": "what is it?"}], add_generation_prompt=True, tokenize=False
        )
        ids = processor.tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
        # White space at the end of a prompt is scored with the answer.
        count = len(ids) - len(processor.tokenizer(prompt.rstrip(), add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        scores.append(sum(float(log_probabilities[i - 1, ids[i]]) for i in range(len(ids) - count, len(ids))))
    given = [pair[0][0] for pair in found["samples"]["local"][0]["resps"]]
    assert given == pytest.approx(scores, abs=1e-4)
    assert found["results"]["local"]["acc,none"] == float(scores[0] > scores[1])
