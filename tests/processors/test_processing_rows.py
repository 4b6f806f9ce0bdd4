import pytest

from chorus_moe.processors import MediaError
from chorus_moe.processors.processing_rows import label_rows, pad_rows, truncate_rows

# 9 is the media token.
ROWS = {"input_ids": [[1, 2, 9, 9, 3, 4], [5, 9]], "attention_mask": [[1] * 6, [1] * 2]}


@pytest.mark.parametrize(
    ("max_length", "side", "expected"),
    [
        (6, "right", [1, 2, 9, 9, 3, 4]),
        (5, "right", [1, 2, 9, 9, 3]),
        (3, "right", [1, 9, 9]),
        (2, "right", [9, 9]),
        (3, "left", [9, 9, 4]),
    ],
)
def test_truncation_drops_text_and_never_media(max_length, side, expected):
    cut = truncate_rows(ROWS, max_length, {9}, side)
    assert cut["input_ids"] == [expected, [5, 9]]
    assert [len(row) for row in cut["attention_mask"]] == [len(row) for row in cut["input_ids"]]


def test_media_longer_than_the_limit_name_their_sample():
    with pytest.raises(MediaError, match="sample 0: images and clips alone take 2 tokens, max_length is 1"):
        truncate_rows(ROWS, 1, {9}, "right")


def test_padding_fills_every_row_on_the_side_asked_for():
    rows = {"input_ids": [[1], [2, 3]], "attention_mask": [[1], [1, 1]], "offset_mapping": [[(0, 1)], [(0, 1), (1, 2)]]}
    left = pad_rows(rows, "left", 0)
    assert left["input_ids"] == [[0, 1], [2, 3]]
    assert left["offset_mapping"][0] == [(0, 0), (0, 1)]
    right = pad_rows(rows, "right", 0, length=3, multiple=4)
    assert right["attention_mask"] == [[1, 0, 0, 0], [1, 1, 0, 0]]
    with pytest.raises(ValueError, match="no pad token"):
        pad_rows(rows, "left", None)


def test_rows_of_one_length_need_no_pad_token():
    rows = {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 1]]}
    assert pad_rows(rows, "left", None) == rows
    for options in ({"length": 3}, {"multiple": 4}):
        with pytest.raises(ValueError, match="no pad token"):
            pad_rows(rows, "left", None, **options)


def test_media_are_never_labelled():
    labels = label_rows([[7, 9, 9, 8]], [[0, 1, 1, 1]], {9})
    assert labels == [[-100, -100, -100, 8]]
