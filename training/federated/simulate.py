"""All clients of a federation in this process, one after the other: to try settings, and to measure."""

from collections.abc import Callable, Mapping

from chorus_moe.training.federated.updates import Refused


class InProcess:
    """Calls the clients, as the network would.

    Flower's own simulation wants ray, which is 400 MB and was some fifteen times slower for small models.

    Args:
        clients: name -> what answers a question, such as `Learner(recipe).answer`.
    """

    def __init__(self, clients: Mapping[str, Callable[[bytes], bytes | None]]):
        self._clients = dict(clients)

    def clients(self) -> list[str]:
        return sorted(self._clients)

    def ask(self, questions: Mapping[str, bytes], seconds: float) -> dict[str, bytes | str]:
        """The answers; time is not limited here, and an error in training is raised."""
        answers: dict[str, bytes | str] = {}
        for name, question in questions.items():
            try:
                answers[name] = self._clients[name](question) or b""
            except Refused as error:
                answers[name] = str(error)
        return answers
