"""How far a student is from its teacher: pure functions of distributions, states and routers.

TRL has the three divergences of distributions in `GKDTrainer.generalized_jsd_loss`, and the tests hold ours against
it. It is not called here because it needs logits of the whole vocabulary, which files do not hold, gives NaN where a
logit is minus infinity, and lies in `trl.experimental`, below a Trainer of its own, in a package that users need for
nothing else.

Shape suffixes: N positions, V shared tokens, K tokens that are known one by one, T rows of a router, E experts.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FORWARD, REVERSE, JENSEN_SHANNON = LOSSES = ("forward_kl", "reverse_kl", "jensen_shannon")
# The logarithm of a probability of 0: exp of it is 0, and 0 times it is 0, not NaN.
LOWEST = -1e4


class TokenProbabilities(NamedTuple):
    """What a teacher expects at each position, at its temperature.

    Args:
        log_probs: `(N, V)` of all tokens by their ids, or `(N, K)` of the most likely ones.
        token_ids: `(N, K)` int64, which tokens these are; None for all in the order of their ids.
        log_rest: `(N,)`, log-probability of all other tokens together; None where there are no others.
    """

    log_probs: Tensor
    token_ids: Tensor | None = None
    log_rest: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "TokenProbabilities":
        """All parts that are there, changed."""
        token_ids, log_rest = (None if part is None else change(part) for part in self[1:])
        return TokenProbabilities(change(self.log_probs), token_ids, log_rest)

    def top(self, k: int) -> "TokenProbabilities":
        """The `k` most likely tokens, and the rest. All of them keep the order of their likelihood."""
        log_probs_NK, token_ids_NK = self.log_probs.topk(k, dim=-1)
        if k == self.log_probs.shape[-1]:
            return TokenProbabilities(log_probs_NK, token_ids_NK)
        # Of what is left, not 1 minus the sum of the top, which rounding would swallow.
        return TokenProbabilities(log_probs_NK, token_ids_NK, log_rest(self.log_probs, token_ids_NK))


def log_rest(log_probs_NV: Tensor, token_ids_NK: Tensor) -> Tensor:
    """`(N,)`: log-probability of all tokens but some."""
    return log_probs_NV.scatter(-1, token_ids_NK, -torch.inf).logsumexp(dim=-1)


def log_probabilities(logits_NV: Tensor, temperature: float) -> Tensor:
    """`(N, V)` float32, whatever the dtype of the logits."""
    return (logits_NV.float() / temperature).log_softmax(dim=-1)


def token_divergence(
    logits_NV: Tensor, teacher: TokenProbabilities, loss: str, *, beta: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """`(N,)` float32: divergence of a student from its teacher at each position, times the squared temperature.

    That factor keeps gradients as large as they are at temperature 1 (arXiv 1503.02531, section 2), so that the weight
    of the loss and the learning rate need no change with it.

    Where the teacher's tokens are only the most likely ones, all others count as one more token, with the rest of the
    probability of either side. The divergence is then a lower bound of the one over all tokens: it asks for the
    teacher's probability of the rest, and leaves open how the student shares it out.

    Args:
        logits_NV: of the student, for the shared tokens.
        loss: "forward_kl", KL(teacher | student); "reverse_kl", KL(student | teacher); or "jensen_shannon", beta
            KL(teacher | mixture) + (1 - beta) KL(student | mixture), where the mixture has beta of the teacher and 1 -
            beta of the student (arXiv 2306.13649, equation 1). Its limits at beta 0 and 1 are 0.
    """
    student_NK = log_probabilities(logits_NV, temperature)
    teacher_NK = teacher.log_probs.float()
    if teacher.token_ids is not None:
        student_NV = student_NK
        student_NK = student_NV.gather(-1, teacher.token_ids)
        if teacher.log_rest is not None:
            rest_N = log_rest(student_NV, teacher.token_ids)
            student_NK = torch.cat([student_NK, rest_N[:, None]], dim=-1)
            teacher_NK = torch.cat([teacher_NK, teacher.log_rest.float()[:, None]], dim=-1)
    return divergence(student_NK, teacher_NK, loss, beta) * temperature**2


def divergence(student: Tensor, teacher: Tensor, loss: str, beta: float = 0.5) -> Tensor:
    """`(...,)` nats between log-probabilities `(..., K)`; see [`token_divergence`]."""
    teacher = teacher.clamp(min=LOWEST)
    if loss == FORWARD:
        return relative_entropy(teacher, student)
    if loss == REVERSE:
        return relative_entropy(student, teacher)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * relative_entropy(teacher, mixture) + (1 - beta) * relative_entropy(student, mixture)


def relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    """KL(p | q) in nats, of log-probabilities `(..., K)`."""
    return (p.exp() * (p - q)).sum(dim=-1)


def state_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`(...,)` float32: squared distance of states `(..., D)` in units of the teacher's squared length: 0 for equal
    ones, 1 for states of zeros. So a token or a layer with large states, of which language models have some, weighs as
    much as any other."""
    student, teacher = student.float(), teacher.float()
    length = teacher.square().sum(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (student - teacher).square().sum(dim=-1) / length


def router_divergence(student_TE: Tensor, teacher_TE: Tensor) -> Tensor:
    """`(T,)`: KL(teacher | student) of the probabilities of experts.

    A teacher with m times as many experts is read in groups: the student's expert i stands for the teacher's experts
    m i to m i + m - 1, with the sum of their probabilities. In a bank split by `expert_split` these are the slices of
    one feed-forward.
    """
    grouped_TE = teacher_TE.unflatten(-1, (student_TE.shape[-1], -1)).sum(dim=-1)
    tiny = torch.finfo(torch.float32).tiny
    return relative_entropy(grouped_TE.clamp(min=tiny).log(), student_TE.clamp(min=tiny).log())
