"""Labels cover the assistant's words; bad samples are counted, never lost in silence."""

import logging
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers.utils import logging as transformers_logging

from chorus_moe import ChorusForConditionalGeneration, ChorusProcessor
from chorus_moe.processors.processing_limits import MediaError
from chorus_moe.training.collator import ChorusDataCollator, clean_messages, without_media
from tests.training.conftest import make_row, make_rows

BROKEN = b"\x89PNG\r\n\x1a\n broken"


def broken_row(index: int = 0) -> dict[str, Any]:
    return {**make_row(3 * index), "images": [BROKEN]}


def labelled(processor: ChorusProcessor, batch: dict[str, torch.Tensor], sample: int) -> str:
    labels = batch["labels"][sample]
    return processor.tokenizer.decode(labels[labels != -100])


GOLDEN = [
    ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "three"}], "three</s>"),
    (
        [
            {"role": "system", "content": "what"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "three"},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": [{"type": "text", "text": "four"}]},
        ],
        "three</s>four</s>",
    ),
    (
        [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "three"},
            {"role": "tool", "content": "assistant\nfive"},
            {"role": "assistant", "content": "four"},
        ],
        "three</s>four</s>",
    ),
    ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}], "</s>"),
]


@pytest.mark.parametrize(("messages", "expected"), GOLDEN)
def test_labels_are_the_assistants_words(processor: ChorusProcessor, messages: list[dict], expected: str) -> None:
    batch = ChorusDataCollator(processor)([{"messages": messages}])
    assert labelled(processor, batch, 0) == expected


def test_a_batch_mixes_samples_with_and_without_media(processor: ChorusProcessor) -> None:
    text = {"messages": GOLDEN[0][0], "images": None}
    batch = ChorusDataCollator(processor)([make_row(0), text, make_row(1), make_row(2)])
    assert [labelled(processor, batch, i) for i in range(4)] == ["three</s>", "three</s>", "four</s>", "five</s>"]
    assert len(batch["pixel_values"]) == 2
    assert len(batch["input_features"]) == 2
    media = batch["mm_token_type_ids"] > 0
    assert (batch["labels"][media] == -100).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_training_batches_are_padded_on_the_right(processor: ChorusProcessor) -> None:
    batch = ChorusDataCollator(processor)([make_row(0), {"messages": GOLDEN[0][0]}])
    assert (batch["attention_mask"][:, 0] == 1).all()
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()
    assert batch["attention_mask"][1, -1] == 0


def test_length_is_cut_in_text_and_rounded_up(processor: ChorusProcessor) -> None:
    row = make_row(0)
    row["messages"] = [*row["messages"][:1], {"role": "assistant", "content": "three " * 50}]
    batch = ChorusDataCollator(processor, max_length=32)([row])
    assert batch["input_ids"].shape == (1, 32)
    assert (batch["mm_token_type_ids"] == 1).sum() == processor.num_image_tokens
    assert ChorusDataCollator(processor, pad_to_multiple_of=64)([make_row(0)])["input_ids"].shape == (1, 64)


def test_none_values_of_arrow_tables_are_not_read(processor: ChorusProcessor) -> None:
    row = make_row(0)
    row["messages"][0]["content"] = [{**part, "image": None, "path": None} for part in row["messages"][0]["content"]]
    row["messages"][0]["content"][0]["text"] = None
    batch, plain = (ChorusDataCollator(processor)([r]) for r in (row, make_row(0)))
    assert torch.equal(batch["input_ids"], plain["input_ids"])
    assert clean_messages(row["messages"]) == make_row(0)["messages"]


def test_a_bad_sample_raises_by_default_and_names_itself(processor: ChorusProcessor) -> None:
    with pytest.raises(MediaError, match="sample 1, image 0"):
        ChorusDataCollator(processor)([make_row(0), broken_row()])


def test_a_skipped_sample_is_counted_and_the_others_stay_as_they_are(processor: ChorusProcessor) -> None:
    collator = ChorusDataCollator(processor, on_bad_media="skip")
    batch = collator([make_row(0), broken_row(), make_row(2)])
    expected = ChorusDataCollator(processor)([make_row(0), make_row(2)])
    assert collator.num_bad_samples == 1
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_too_many_bad_samples_are_an_error_with_both_numbers(processor: ChorusProcessor) -> None:
    collator = ChorusDataCollator(processor, on_bad_media="skip", max_bad_samples=2)
    collator([make_row(0), broken_row(), broken_row()])
    with pytest.raises(MediaError, match="3 samples could not be read, max_bad_samples is 2"):
        collator([make_row(0), broken_row()])


def test_a_batch_of_bad_samples_teaches_nothing_and_breaks_nothing(
    processor: ChorusProcessor, model: ChorusForConditionalGeneration
) -> None:
    batch = ChorusDataCollator(processor, on_bad_media="skip")([broken_row(), broken_row()])
    assert (batch["labels"] == -100).all()
    loss = model.train()(**batch, num_items_in_batch=torch.tensor(0)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_workers_count_together(processor: ChorusProcessor) -> None:
    collator = ChorusDataCollator(processor, on_bad_media="skip")
    rows = [make_row(0), broken_row(), make_row(1), broken_row()]
    batches = list(DataLoader(rows, batch_size=2, num_workers=2, collate_fn=collator))
    assert [len(batch["labels"]) for batch in batches] == [1, 1]
    assert collator.num_bad_samples == 2


def test_a_batch_without_labels_warns_once(processor: ChorusProcessor, caplog: pytest.LogCaptureFixture) -> None:
    transformers_logging.enable_propagation()
    collator, row = ChorusDataCollator(processor), {"messages": [{"role": "user", "content": "hi"}]}
    with caplog.at_level(logging.WARNING):
        collator([row])
        collator([row])
    transformers_logging.disable_propagation()
    assert sum("has no labels" in record.message for record in caplog.records) == 1


def test_a_setting_nobody_knows_is_refused(processor: ChorusProcessor) -> None:
    with pytest.raises(ValueError, match="on_bad_media='ignore'; choose 'raise' or 'skip'"):
        ChorusDataCollator(processor, on_bad_media="ignore")


def test_media_parts_are_taken_out_of_messages() -> None:
    kept = without_media(make_rows(3)[2]["messages"])
    assert [part["type"] for part in kept[0]["content"]] == ["text"]
    assert kept[1] == {"role": "assistant", "content": "five"}


def talk(*answers: dict[str, Any]) -> list[dict[str, Any]]:
    return [turn for answer in answers for turn in ({"role": "user", "content": "hi"}, {"role": "assistant", **answer})]


LEFT_OUT = [{"weight": 0}, {"train": False}, {"loss": False}]


@pytest.mark.parametrize("mark", LEFT_OUT)
def test_a_turn_that_is_not_to_be_learned_has_no_label(processor: ChorusProcessor, mark: dict[str, Any]) -> None:
    plain = talk({"content": "three"}, {"content": "five"}, {"content": "four"})
    marked = talk({"content": "three"}, {"content": "five", **mark}, {"content": "four", "weight": 1})
    image = {**make_row(0), "messages": [*make_row(0)["messages"], *marked[2:]]}
    batch = ChorusDataCollator(processor)([{"messages": marked}, {"messages": plain}, image])
    found = [labelled(processor, batch, sample) for sample in range(3)]
    assert found == ["three</s>four</s>", "three</s>five</s>four</s>", "three</s>four</s>"]
    # The turn is read all the same.
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])


def test_turns_are_left_out_also_where_the_text_is_cut(processor: ChorusProcessor) -> None:
    marked = {"messages": talk({"content": "three", "weight": 0}, {"content": "five"}, {"content": "four"})}
    length = len(ChorusDataCollator(processor)([marked])["input_ids"][0])
    cut = ChorusDataCollator(processor, max_length=length - 9)([marked])
    assert labelled(processor, cut, 0).startswith("five")
    processor.tokenizer.truncation_side = "left"
    for shorter in (9, length // 2):
        assert "three" not in labelled(
            processor, ChorusDataCollator(processor, max_length=length - shorter)([marked]), 0
        )
    processor.tokenizer.truncation_side = "right"


def test_a_weight_between_is_an_error_of_its_sample(processor: ChorusProcessor) -> None:
    rows = [{"messages": talk({"content": "three"})}, {"messages": talk({"content": "three", "weight": 0.5})}]
    with pytest.raises(MediaError, match=r"sample 1: weight=0.5 of a turn"):
        ChorusDataCollator(processor)(rows)


def test_rows_of_other_projects_lose_no_medium(processor: ChorusProcessor) -> None:
    ours = make_row(2)
    theirs = {
        "conversations": [{"from": "human", "value": "<audio><image>what is it?"}, {"from": "gpt", "value": "five"}],
        "image": ours["images"][0],
        "audios": ours["audio"],
    }
    expected, found = (ChorusDataCollator(processor)([row]) for row in (ours, theirs))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    with pytest.raises(MediaError, match=r"sample 1: key 'images': 0 items for 0 image parts and 1 <image>"):
        ChorusDataCollator(processor)([ours, {"messages": talk({"content": "<image>"})}])
    skipping = ChorusDataCollator(processor, on_bad_media="skip")
    assert len(skipping([{"text": "hi"}, ours])["input_ids"]) == 1
    assert skipping.num_bad_samples == 1
    assert (skipping([{"text": "hi"}])["labels"] == -100).all()


def test_prompts_end_before_the_answer_and_lie_on_the_left(processor: ChorusProcessor) -> None:
    batch = ChorusDataCollator(processor, prompt_only=True)([make_row(0), {"messages": GOLDEN[0][0]}])
    assert "labels" not in batch
    assert (batch["attention_mask"][:, -1] == 1).all()
    assert (batch["attention_mask"][1, 0] == 0).all()
    words = processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert [text.endswith("assistant\n") for text in words] == [True, True]
    assert "three" not in "".join(words)
    with pytest.raises(MediaError, match="sample 0: the last turn is 'user'"):
        ChorusDataCollator(processor, prompt_only=True)([{"messages": GOLDEN[0][0][:1]}])


def test_documents_and_conversations_share_a_batch(processor: ChorusProcessor) -> None:
    """A document is its text, its media and the end, all text learned; the conversation is what it is alone."""
    row = make_row(2)
    content = [{"type": "text", "text": "three "}, {"type": "image"}, {"type": "text", "text": " four"}]
    written = {"messages": [{"role": "document", "content": content}], "images": row["images"]}
    collator = ChorusDataCollator(processor)
    both, alone, document = collator([row, written]), collator([row]), collator([written])
    length = alone["input_ids"].shape[1]
    assert both["input_ids"][0, :length].tolist() == alone["input_ids"][0].tolist()
    assert both["labels"][0, :length].tolist() == alone["labels"][0].tolist()
    tokenizer = processor.tokenizer
    first, last = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("three ", " four"))
    size = int((document["input_ids"] == processor.image_token_id).sum())
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    expected = [*begin, *first, *[processor.image_token_id] * size, *last, tokenizer.eos_token_id]
    assert document["input_ids"][0].tolist() == expected
    learned = [*[-100] * len(begin), *first, *[-100] * size, *last, tokenizer.eos_token_id]
    assert document["labels"][0].tolist() == learned == both["labels"][1, : len(learned)].tolist()
    # A turn that is not learned, beside a document.
    row["messages"][-1]["weight"] = 0
    assert bool((collator([row, written])["labels"][0] == -100).all())


def test_more_columns_join_the_batch_one_after_the_other(processor: ChorusProcessor) -> None:
    def numbers(rows: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"numbers": torch.tensor([row["number"] for row in rows])}

    def doubled(rows: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"doubled": 2 * batch["numbers"]}

    rows = [{**row, "number": index} for index, row in enumerate(make_rows(3))]
    batch = ChorusDataCollator(processor, more=(numbers, doubled))(rows)
    plain = ChorusDataCollator(processor)(rows)
    assert batch.keys() == plain.keys() | {"numbers", "doubled"}
    assert all(torch.equal(batch[name], value) for name, value in plain.items())
    assert batch["doubled"].tolist() == [0, 2, 4]
