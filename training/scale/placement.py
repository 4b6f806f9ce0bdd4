"""Which device each expert of a bank lies on, and what leaves a device: simulated with choices of a trained model.

Unusual here:
- a token's home is any device with equal chance, as rows are spread over ranks without regard to what is in them. So of
  D devices a choice leaves with probability (D - 1) / D whatever the placement; what placement changes is how many
  devices a token visits;
- transformers' exchange sends a row for every choice; one that sends a token once to each device sends `copies`.

Shape suffixes: T tokens, K experts per token, E experts, D devices.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from chorus_moe.modeling.moe_selection import best_experts, limit_groups

SWEEPS = 20


@dataclass(frozen=True)
class Travel:
    """What leaves a device, in the mean over tokens and homes.

    Args:
        tokens: share of tokens that need an expert of another device.
        choices: rows that leave for each token, one for every choice.
        copies: rows that leave for each token, one for every device that it visits.
        load: choices on the fullest device over their mean.
    """

    tokens: float
    choices: float
    copies: float
    load: float

    def sent_bytes(self, hidden_size: int, itemsize: int) -> dict[str, float]:
        """Bytes for each token, there and back, by what is sent."""
        row = 2 * hidden_size * itemsize
        return {"choices": self.choices * row, "copies": self.copies * row}


def travel(choices_TK: Tensor, device_E: Tensor, num_devices: int) -> Travel:
    """What leaves a device.

    Args:
        choices_TK: experts of each token.
        device_E: where each expert lies.

    Raises:
        ValueError: a choice of an expert that no device has.
    """
    if int(choices_TK.max()) >= len(device_E):
        raise ValueError(f"placement: a token chose expert {int(choices_TK.max())} of {len(device_E)} placed experts")
    visited_TK, abroad = device_E[choices_TK], (num_devices - 1) / num_devices
    is_visited_TD = torch.zeros(len(choices_TK), num_devices, dtype=torch.bool).scatter_(1, visited_TK, True)
    count_T, load_D = is_visited_TD.sum(dim=1), torch.bincount(visited_TK.flatten(), minlength=num_devices).double()
    return Travel(
        # At home are tokens of one device alone, where that is theirs.
        tokens=1 - float((count_T == 1).double().mean()) / num_devices,
        choices=choices_TK.shape[1] * abroad,
        copies=float(count_T.double().mean()) * abroad,
        load=float(load_D.max() / load_D.mean()),
    )


def in_order(num_experts: int, num_devices: int) -> Tensor:
    """`(E,)`: neighbours on one device, as expert parallelism places them.

    Raises:
        ValueError: they do not divide.
    """
    if num_experts % num_devices:
        raise ValueError(f"placement: num_experts={num_experts} do not divide by {num_devices} devices")
    return torch.arange(num_experts) // (num_experts // num_devices)


def by_co_activation(choices_TK: Tensor, num_experts: int, num_devices: int) -> Tensor:
    """`(E,)`: equally many experts on each device, those that tokens choose together side by side.

    Devices are filled one after the other with what has most in common with those that are there; then pairs of
    experts change places as long as that keeps more choices of a token together.
    """
    device_E = in_order(num_experts, num_devices)
    chosen_TE = torch.zeros(len(choices_TK), num_experts, dtype=torch.float64).scatter_(1, choices_TK, 1.0)
    together_EE = (chosen_TE.T @ chosen_TE).fill_diagonal_(0)
    left = set(range(num_experts))
    for device in range(num_devices):
        common_E = chosen_TE.sum(dim=0)  # the first is the one that is chosen most
        for place in range(num_experts // num_devices):
            best = max(sorted(left), key=lambda expert: float(common_E[expert]))
            common_E = together_EE[best] + (common_E if place else 0)
            device_E[best] = device
            left.remove(best)
    for _ in range(SWEEPS):
        moved = False
        for expert in range(num_experts):
            # What an expert has in common with those of each device.
            common_ED = together_EE @ torch.nn.functional.one_hot(device_E, num_devices).double()
            own_E = common_ED.gather(1, device_E[:, None]).squeeze(1)
            # Each gains what it has in common there and loses what it has here; their own pair counts for neither.
            gain_E = common_ED[expert, device_E] - own_E[expert] + common_ED[:, device_E[expert]] - own_E
            gain_E = (gain_E - 2 * together_EE[expert]).masked_fill(device_E == device_E[expert], 0)
            other = int(gain_E.argmax())
            if gain_E[other] > 0:
                device_E[[expert, other]] = device_E[[other, expert]]
                moved = True
        if not moved:
            break
    return device_E


def choose_in_groups(scores_TE: Tensor, top_k: int, group_E: Tensor, topk_groups: int) -> Tensor:
    """`(T, K)`: what tokens would choose within their best groups, as a bank with `topk_groups` does.

    Args:
        scores_TE: positive scores of the experts, such as the router's probabilities.
        group_E: the group of each expert, equally many in each.
    """
    order_E = group_E.argsort(stable=True)
    grouped_TE = limit_groups(scores_TE[:, order_E], int(group_E.max()) + 1, topk_groups)
    return order_E[best_experts(grouped_TE, top_k)]
