"""Tokenizers: a new one for a model without parents, and media tokens for those of others."""

from collections.abc import Iterable

from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<pad>", "<s>", "</s>"
# Every byte is a token, so no string is unknown.
BYTE_ALPHABET_SIZE = 256


def build_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 512,
    image_token: str = "<image>",
    audio_token: str = "<audio>",
    model_max_length: int | None = None,
    individual_digits: bool = True,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`: every string has tokens and decodes to itself.

    The ids are `<pad>` 0, `<s>` 1, `</s>` 2, image 3, audio 4. Pads on the left. Every digit is a token of its own
    unless `individual_digits` is False.

    Args:
        vocab_size: at least 261; exactly 261 (bytes and special tokens) gives a character tokenizer.

    Raises:
        ValueError: a vocabulary too small for the bytes.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as cause:
        raise ImportError("a new tokenizer needs `pip install tokenizers`") from cause

    specials = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, image_token, audio_token]
    smallest = BYTE_ALPHABET_SIZE + len(specials)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size={vocab_size} is too small: bytes and special tokens need {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=individual_digits),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The words of the chat template, twice: a pair that occurs once is not merged.
    corpus = [*texts, "system\nuser\nassistant\n", "system\nuser\nassistant\n"]
    tokenizer.train_from_iterator(corpus, trainer)
    limit = {} if model_max_length is None else {"model_max_length": model_max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        extra_special_tokens={"image_token": image_token, "audio_token": audio_token},
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **limit,
    )


def add_media_tokens(
    tokenizer: PreTrainedTokenizerBase, image_token: str = "<image>", audio_token: str = "<audio>"
) -> int:
    """Make the placeholders special tokens of `tokenizer`, and eos its pad token when it has none.

    Returns:
        Number of tokens added; when above 0 the model needs `resize_token_embeddings(len(tokenizer))`.
    """
    missing = [token for token in (image_token, audio_token) if token not in tokenizer.get_vocab()]
    added = tokenizer.add_special_tokens(
        # Not normalised: lower-casing tokenizers would change the placeholder before they look for it.
        {"extra_special_tokens": [AddedToken(token, special=True, normalized=False) for token in missing]},
        replace_extra_special_tokens=False,
    ) if missing else 0  # fmt: skip
    # Many decoder-only tokenizers have none, and batches need padding.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return added
