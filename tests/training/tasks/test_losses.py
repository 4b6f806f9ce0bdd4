"""The loss by task is the sum over tokens that the model has anyway, divided among the tasks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from chorus_moe import ChorusForConditionalGeneration
from chorus_moe.training.tasks.losses import TaskLoss
from tests.conftest import tiny_batch, tiny_config


def by_hand(logits: Tensor, labels: Tensor, row: int) -> Tensor:
    """Sum of the losses of a row's labels, token by token."""
    log_probs = logits[row].double().log_softmax(dim=-1)
    found = [-log_probs[i, label] for i, label in enumerate(labels[row, 1:].tolist()) if label != -100]
    return torch.stack(found).sum()


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture
def labels() -> Tensor:
    found = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(1))
    found[0, :3] = found[1, 4:] = -100
    return found


def plain(logits: Tensor, labels: Tensor, num_items_in_batch: object = None, **options: object) -> Tensor:
    return logits.new_full((), 7.0)


def test_each_token_has_the_weight_of_its_rows_task(logits: Tensor, labels: Tensor) -> None:
    loss, weights = TaskLoss(plain, 3), torch.tensor([2.0, 1.0, 0.5])
    with loss.of(torch.tensor([2, 0, 2]), weights):
        total = loss(logits, labels, num_items_in_batch=10)
    sums = [by_hand(logits, labels, row) for row in range(3)]
    expected = (0.5 * sums[0] + 2 * sums[1] + 0.5 * sums[2]) / 10
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss.found is not None
    assert loss.found.sums_K.tolist() == pytest.approx([sums[1].item(), 0, (sums[0] + sums[2]).item()], rel=1e-6)
    assert loss.found.tokens_K.tolist() == [3, 0, 8]
    total.backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0


def test_without_a_count_it_is_a_mean_over_the_labels(logits: Tensor, labels: Tensor) -> None:
    loss = TaskLoss(plain, 1, epsilon=0.1)
    with loss.of(torch.zeros(3, dtype=torch.long), torch.ones(1)):
        total = loss(logits, labels)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_outside_of_a_block_the_old_loss_is_back(logits: Tensor, labels: Tensor) -> None:
    loss = TaskLoss(plain, 1)
    with pytest.raises(RuntimeError), loss.of(torch.zeros(3, dtype=torch.long), torch.ones(1)):
        raise RuntimeError
    assert float(loss(logits, labels)) == 7


def test_apart_the_value_stays_and_the_graph_is_the_tasks_own(logits: Tensor, labels: Tensor) -> None:
    loss, arguments = TaskLoss(plain, 2), (torch.tensor([0, 1, 1]), torch.tensor([1.0, 3.0]))
    with loss.of(*arguments):
        whole = loss(logits, labels, num_items_in_batch=5)
    with loss.of(*arguments, is_apart=True):
        apart = loss(logits, labels, num_items_in_batch=5)
    assert apart.equal(whole)
    assert not apart.requires_grad
    assert loss.found is not None and loss.found.weighted_K.requires_grad


@pytest.mark.parametrize("exits", [{}, {"exit_layers": [1], "exit_loss_coef": 0.5}])
def test_weights_of_one_are_the_models_own_loss(exits: dict[str, object]) -> None:
    torch.manual_seed(0)
    model = ChorusForConditionalGeneration(tiny_config(router_aux_loss_coef=0.1, **exits)).train()
    batch = tiny_batch(model.config)
    expected = model(**batch, num_items_in_batch=30).loss
    loss = TaskLoss(model.loss_function, 2)
    model.loss_function = loss
    with loss.of(torch.tensor([0, 1, 0]), torch.ones(2)):
        once = model(**batch, num_items_in_batch=30)
    torch.testing.assert_close(once.loss, expected, atol=0, rtol=1e-6)
    assert loss.found is not None
    tasks = loss.found.weighted_K.sum() + (0.5 * once.exit_loss if exits else 0)
    with loss.of(torch.tensor([0, 1, 0]), torch.full((2,), 2.0)):
        twice = model(**batch, num_items_in_batch=30)
    # Losses at exits are doubled, too; those of routers are not.
    torch.testing.assert_close(twice.loss - once.loss, tasks, atol=0, rtol=1e-5)


def test_a_batch_without_labels_costs_nothing(logits: Tensor) -> None:
    loss = TaskLoss(plain, 2)
    with loss.of(torch.tensor([-1, -1, -1]), torch.ones(2)):
        assert loss(logits, torch.full((3, 6), -100), num_items_in_batch=1).item() == 0
