import pytest
from transformers import AutoTokenizer

from chorus_moe.surgery.tokenizer import add_media_tokens, build_tokenizer
from tests.processors.conftest import CORPUS


def test_every_string_decodes_to_itself(tmp_path, capfd):
    tokenizer = build_tokenizer(CORPUS, vocab_size=300)
    assert capfd.readouterr() == ("", "")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Which digit is written?", " 17 + 5\n\ttab", "größer als 3, 日本 🙂", ""):
        assert loaded.decode(tokenizer(text).input_ids) == text
    assert loaded.padding_side == "left"
    assert loaded.image_token == "<image>"


def test_special_ids_are_the_fixed_ones():
    tokenizer = build_tokenizer(CORPUS, vocab_size=261)
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>", "<image>", "<audio>"]) == [0, 1, 2, 3, 4]
    assert len(tokenizer) == 261
    assert len(tokenizer("17").input_ids) == 2


def test_a_vocabulary_below_the_bytes_is_an_error():
    with pytest.raises(ValueError, match="need 261"):
        build_tokenizer(CORPUS, vocab_size=260)


def test_media_tokens_are_added_once_and_the_pad_token_is_filled():
    tokenizer = build_tokenizer(CORPUS, vocab_size=300, image_token="<img>", audio_token="<snd>")
    size = len(tokenizer)
    tokenizer.pad_token = None
    assert add_media_tokens(tokenizer) == 2
    assert add_media_tokens(tokenizer) == 0
    assert len(tokenizer) == size + 2
    assert len(tokenizer("a<image>b<audio>").input_ids) == 4
    assert tokenizer.pad_token == tokenizer.eos_token
