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


def test_every_list_is_padded_with_its_own_value_to_the_length_that_is_needed():
    names = ("input_ids", "attention_mask", "special_tokens_mask", "mm_token_type_ids", "offset_mapping")
    rows = {name: [[(3, 4)] if name == "offset_mapping" else [1]] for name in names}
    for options, count in (({}, 0), ({"length": 1}, 0), ({"length": 2}, 1), ({"multiple": 3}, 2), ({"multiple": 1}, 0)):
        found = pad_rows(rows, "right", 7, **options)
        fillers = dict(zip(names, (7, 0, 1, 0, (0, 0)), strict=True))
        assert found == {name: [[*rows[name][0], *[fillers[name]] * count]] for name in names}
    # Rows without a token are as long as the longest, which has none either.
    assert pad_rows({"input_ids": [[]]}, "left", 7) == {"input_ids": [[]]}
    assert pad_rows({"input_ids": [[1, 2]]}, "left", None, length=1, multiple=2) == {"input_ids": [[1, 2]]}


def test_lists_of_other_lengths_are_no_rows():
    """Cut or labelled in silence they would belong to other tokens."""
    for call in (
        lambda: truncate_rows({"input_ids": [[1]], "mask": [[1], [1]]}, 1, set(), "right"),
        lambda: label_rows([[1, 2]], [[1]], set()),
        lambda: label_rows([[1]], [[1], [1]], set()),
    ):
        with pytest.raises(ValueError, match="zip"):
            call()


@pytest.mark.parametrize(("side", "kept"), [("left", [[9, 3], [4]]), ("right", [[1, 9], [4]])])
def test_rows_are_cut_alike_in_every_list(side, kept):
    rows = {"input_ids": [[1, 2, 9, 3], [4]], "place": [[0, 1, 2, 3], [0]]}
    cut = truncate_rows(rows, 2, {9}, side)
    assert cut["input_ids"] == kept
    assert [[rows["input_ids"][i][p] for p in row] for i, row in enumerate(cut["place"])] == kept
    assert truncate_rows(rows, 4, {9}, side) == rows


def test_a_token_is_labelled_where_it_was_spoken():
    assert label_rows([[7, 8, 9], [6]], [[1, 0, 1], [1]], {9}) == [[7, -100, -100], [6]]
