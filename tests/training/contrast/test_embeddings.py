"""Each different item is embedded once, whatever batch it is in."""

import pytest
import torch

from chorus_moe import ChorusForConditionalGeneration, ChorusForContrastive, ChorusProcessor
from chorus_moe.training.contrast.collator import PairCollator
from chorus_moe.training.contrast.embeddings import check_trained, embed_media, embed_pairs, embed_texts
from tests.training.contrast.conftest import TEXTS, make_pair


def test_items_have_the_vectors_of_the_model_and_equal_ones_are_one(
    contrastive: ChorusForContrastive, processor: ChorusProcessor
) -> None:
    rows = [make_pair(index) for index in range(6)]
    rows[4] |= {"image": rows[1]["image"]}
    with torch.no_grad():
        whole = contrastive(**PairCollator(processor)(rows))
    for batch_size in (2, 4):
        found = embed_pairs(contrastive, processor, rows, batch_size=batch_size, progress=False)
        assert {name: len(part.vectors) for name, part in found.items()} == {"text": 4, "image": 5, "audio": 6}
        assert found["text"].items.tolist() == [0, 1, 2, 0, 3, 2]
        assert found["image"].items.tolist() == [0, 1, 2, 3, 1, 4]
        for name, part in found.items():
            # Padding and batch mates: sums in another order, of values of size 1.
            torch.testing.assert_close(part.vectors[part.items], whole[f"{name}_embeds"], rtol=0, atol=1e-5)
    assert len(set(TEXTS)) == 4


def test_a_head_that_was_never_trained_is_refused(
    contrastive: ChorusForContrastive, model: ChorusForConditionalGeneration, processor: ChorusProcessor, tmp_path
) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved as ChorusForConditionalGeneration; vectors come from a trained"):
        check_trained(ChorusForContrastive.from_pretrained(tmp_path))
    contrastive.save_pretrained(tmp_path)
    check_trained(ChorusForContrastive.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="found ChorusForConditionalGeneration"):
        embed_pairs(model, processor, [make_pair(0)], progress=False)
    with pytest.raises(ValueError, match="no rows"):
        embed_pairs(contrastive, processor, [], progress=False)


def test_texts_and_media_alone_have_the_vectors_that_they_have_in_pairs(
    contrastive: ChorusForContrastive, processor: ChorusProcessor
) -> None:
    rows = [make_pair(index) for index in range(3)]
    pairs = embed_pairs(contrastive, processor, rows, progress=False)
    alone = {"text": embed_texts(contrastive, processor, TEXTS[:3])}
    alone |= {
        name: embed_media(contrastive, processor, name, [row[name] for row in rows]) for name in ("image", "audio")
    }
    for name, vectors in alone.items():
        # Sums in another order, of values of size 1; and no graph that keeps the model's states.
        torch.testing.assert_close(vectors, pairs[name].vectors[pairs[name].items], rtol=0, atol=1e-5)
        assert not vectors.requires_grad and not pairs[name].vectors.requires_grad
