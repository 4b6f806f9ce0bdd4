"""A server that begins its first round when three clients are there, however long their starts take."""

from chorus_moe.serving.commands import main
from chorus_moe.training.federated.flower_server import FlowerServer

found, were_three = FlowerServer.clients, False


def clients(self: FlowerServer) -> list[str]:
    global were_three
    names = found(self)
    were_three = were_three or len(names) >= 3
    return names if were_three else []


FlowerServer.clients = clients  # type: ignore[method-assign]
main()
