"""The commands `chorus-moe federated ...`. They import what they need when they run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from chorus_moe.training.federated.exchange import need_flower
from chorus_moe.training.options import without

federated = typer.Typer(
    help="Train one model on rows that stay where they are: a server, clients, or all in one process.",
    no_args_is_help=True,
)
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipeName = Annotated[str, typer.Argument(help="recipe in YAML; more options override it: `--rounds 5`")]
# Of `gather` and `withdraw`, which load a model on the CPU and may train its gates.
GATES = "the gates are trained as their recipe says: training.use_cpu, model.dtype"
NoDevice = Annotated[str | None, without("--device", GATES)]
NoDtype = Annotated[str | None, without("--dtype", GATES)]
Insecure = Annotated[bool, typer.Option("--insecure", help="plain HTTP; for one machine, or below a tunnel")]


@federated.command(context_settings=PASS_ON)
def server(
    context: typer.Context,
    recipe: RecipeName,
    listen: Annotated[str, typer.Option(help="HOST:PORT; 0.0.0.0:9092 for clients on other machines")] = (
        "127.0.0.1:9092"
    ),
    clients: Annotated[
        Path | None, typer.Option(help="public keys of ssh-keygen, one a line: who may take part", exists=True)
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM file of the server's certificate", exists=True)] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of its private key", exists=True)] = None,
    insecure: Insecure = False,
) -> None:
    """Ask clients for what they learn and join it, round by round; started again, it goes on after the last one."""
    need_flower()
    if insecure == (certificate is not None) or (certificate is None) != (key is None):
        raise ValueError("give --certificate and --key, or --insecure for plain HTTP")
    if not insecure and clients is None:
        raise ValueError("--clients is missing: a file of the public keys of those that may take part")
    from chorus_moe.training.federated.flower_server import FlowerServer, read_clients
    from chorus_moe.training.federated.run import run_server
    from chorus_moe.training.recipe import read_recipe

    read = read_recipe(recipe, context.args)
    known = None if clients is None else read_clients(clients)
    database = Path(read.training.output_dir) / "flower.sqlite"
    with FlowerServer(listen, database, known, certificate, key) as exchange:
        print(json.dumps(run_server(read, exchange), indent=2))


@federated.command(context_settings=PASS_ON)
def client(
    context: typer.Context,
    recipe: RecipeName,
    server: Annotated[str, typer.Option(help="HOST:PORT of the server")] = "127.0.0.1:9092",
    private_key: Annotated[
        Path | None, typer.Option(help="of ssh-keygen -t ecdsa -b 384; the server has its other half", exists=True)
    ] = None,
    root_certificate: Annotated[
        Path | None, typer.Option(help="PEM file of who vouches for the server's certificate", exists=True)
    ] = None,
    insecure: Insecure = False,
) -> None:
    """Train on own rows when the server asks, and send what was learned; ends when the server has no more rounds."""
    need_flower()
    if insecure and (private_key or root_certificate):
        raise ValueError("--insecure speaks plain HTTP: leave --private-key and --root-certificate out")
    if not insecure and private_key is None:
        raise ValueError("--private-key is missing: the server lets in whom it knows; or --insecure for plain HTTP")
    from chorus_moe.training.federated.flower_client import serve_server
    from chorus_moe.training.federated.learner import Learner
    from chorus_moe.training.federated.secure_client import SecureLearner
    from chorus_moe.training.recipe import read_recipe

    learner = Learner.of(read_recipe(recipe, context.args))
    serve_server(server, SecureLearner(learner).answer, private_key, root_certificate, is_plain=insecure)


@federated.command(context_settings=PASS_ON)
def simulate(
    context: typer.Context,
    recipe: RecipeName,
    client: Annotated[list[str], typer.Option(help="recipe of a client; may be repeated")],
) -> None:
    """Server and clients in this process, without a network; options override the server's recipe."""
    from chorus_moe.training.federated.run import simulate as run
    from chorus_moe.training.recipe import read_recipe

    clients = {f"{place}_{Path(name).stem}": read_recipe(name) for place, name in enumerate(client)}
    print(json.dumps(run(read_recipe(recipe, context.args), clients), indent=2))


@federated.command()
def gather(
    base: Annotated[str, typer.Argument(help="model that all banks were trained on: a folder or a Hub id")],
    bank: Annotated[list[Path], typer.Option(help="file of `save_bank`; may be repeated", exists=True)],
    out: Annotated[Path, typer.Option(help="new folder for the model")],
    gates: Annotated[
        Path | None, typer.Option(help="recipe with public rows, by which the banks' gates are trained", exists=True)
    ] = None,
    device: NoDevice = None,
    dtype: NoDtype = None,
) -> None:
    """Put the banks of several owners into one model, and train their gates on public rows."""
    from chorus_moe.training.federated.owned_banks import gather_banks, read_gates

    print(f"wrote {out} with the banks {', '.join(gather_banks(base, bank, out, read_gates(gates)))}")


@federated.command()
def withdraw(
    model: Annotated[Path, typer.Argument(help="folder that `gather` has written")],
    bank: Annotated[str, typer.Argument(help="bank to take out")],
    out: Annotated[Path, typer.Option(help="new folder for the model")],
    device: NoDevice = None,
    dtype: NoDtype = None,
) -> None:
    """Make a gathered model anew, as if a bank had never been in it."""
    from chorus_moe.training.federated.owned_banks import withdraw_bank

    print(f"wrote {out} with the banks {', '.join(withdraw_bank(model, bank, out))}")
