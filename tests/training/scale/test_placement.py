import pytest
import torch

from chorus_moe.training.scale.placement import by_co_activation, choose_in_groups, in_order, travel

# Two cliques that lie across the devices: 0, 2, 4, 6 and 1, 3, 5, 7.
CLIQUES = torch.tensor([[0, 2], [4, 6], [0, 6], [2, 4], [1, 3], [5, 7], [1, 7], [3, 5]])


def test_what_leaves_is_counted_over_all_homes() -> None:
    choices_TK, device_E = torch.tensor([[0, 1], [0, 2], [3, 2]]), torch.tensor([0, 0, 1, 1])
    found = travel(choices_TK, device_E, 2)
    # By hand: each token at each of two homes.
    leaving = [[home for home in (0, 1) if {int(device_E[e]) for e in row} != {home}] for row in choices_TK]
    copies = [len({int(device_E[e]) for e in row} - {home}) for row in choices_TK for home in (0, 1)]
    assert found.tokens == pytest.approx(sum(map(len, leaving)) / 6)
    assert found.copies == pytest.approx(sum(copies) / 6)
    assert found.choices == 1.0 and found.load == 1.0
    assert found.sent_bytes(64, 2) == {"choices": 256.0, "copies": pytest.approx(256 * found.copies)}


def test_experts_that_are_chosen_together_come_to_lie_together() -> None:
    device_E = by_co_activation(CLIQUES, 8, 2)
    assert torch.bincount(device_E).tolist() == [4, 4]
    before, after = (travel(CLIQUES, device, 2) for device in (in_order(8, 2), device_E))
    # Every token visits one device: of two homes, one is the right one.
    assert after.copies == 0.5 < before.copies and after.tokens == 0.5 and after.load == 1.0


def test_a_token_stays_within_its_best_groups() -> None:
    scores_TE = torch.rand(50, 8, generator=torch.Generator().manual_seed(0))
    group_E = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    found_TK = choose_in_groups(scores_TE, 3, group_E, 2)
    assert all(len({int(group_E[e]) for e in row}) <= 2 for row in found_TK)
    # With all groups open they are the best of all.
    assert torch.equal(choose_in_groups(scores_TE, 3, group_E, 4), scores_TE.topk(3).indices)


def test_numbers_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="num_experts=6 do not divide by 4 devices"):
        in_order(6, 4)
    with pytest.raises(ValueError, match="chose expert 7 of 4 placed experts"):
        travel(CLIQUES, torch.zeros(4, dtype=torch.long), 2)
