"""Real processes on loopback, over TLS and with keys: a killed client, a poisoned one, a stranger, a killed server."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import PeftModel
from transformers import AutoModelForMultimodalLM

from chorus_moe.training.federated.updates import unpack
from tests.fresh_process import ROOT, started
from tests.training.federated.conftest import ADAPTER, BANKS, by_rows, sections, write_federation

pytest.importorskip("flwr", reason="Flower is not installed: `.ci/matrix federated` runs this")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ssh-keygen") is None or shutil.which("openssl") is None, reason="makes keys"),
]

COMMAND = "from chorus_moe.serving.commands import main\nmain()"
LIAR, QUITTER, PATIENT = (Path(__file__).with_name(f"{name}.py") for name in ("liar", "quitter", "patient"))
CLIENTS = ("eyes", "ears", "both", "liar", "stranger")


def make_keys(folder: Path) -> None:
    """The commands of docs/guides/federated.md."""
    page = (ROOT / "docs/guides/federated.md").read_text(encoding="utf-8")
    code = page.split('```bash title="keys.sh"\n')[1].split("```")[0]
    subprocess.run(["bash", "-eu", "-c", code.replace("server.example.org", "localhost")], cwd=folder, check=True,
                   capture_output=True)  # fmt: skip
    for name in CLIENTS:
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-C", name, "-f", name], cwd=folder, check=True
        )
    known = [(folder / f"{name}.pub").read_text(encoding="utf-8") for name in CLIENTS if name != "stranger"]
    (folder / "clients.txt").write_text("".join(known), encoding="utf-8")


class Site:
    """A folder with keys, recipes and logs of all processes."""

    def __init__(self, folder: Path, trained: dict[str, Any] = ADAPTER, **changes: Any):
        self.folder = write_federation(folder)
        make_keys(folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"localhost:{free.getsockname()[1]}"
        federated = {"rounds": 3, "min_clients": 2, "round_seconds": 20, "max_failed_rounds": 20} | changes
        self.write("server", {**sections(folder, trained, folder / "out"), "federated": federated})
        for name in CLIENTS:
            rows = name if name in ("eyes", "ears") else "both"
            self.write(name, sections(folder, trained, folder / f"run_{name}", rows))

    def write(self, name: str, recipe: dict[str, Any]) -> None:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

    @contextlib.contextmanager
    def runs(self, log: str, program: str | Path, *words: str) -> Iterator[Any]:
        path = self.folder / "logs" / log
        path.mkdir(parents=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with started(program, words, cwd=self.folder, environment=environment, log=path) as process:
            yield process

    def server(self, log: str) -> Any:
        keys = ["--clients", "clients.txt", "--certificate", "server.pem", "--key", "server.key"]
        return self.runs(log, COMMAND, "federated", "server", "server.yaml", "--listen", self.address, *keys)

    def client(self, name: str) -> Any:
        keys = ["--private-key", name, "--root-certificate", "ca.pem"]
        return self.runs(name, COMMAND, "federated", "client", f"{name}.yaml", "--server", self.address, *keys)

    def rounds(self) -> list[dict[str, Any]]:
        path = self.folder / "out" / "rounds.json"
        with contextlib.suppress(json.JSONDecodeError):
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return []

    def said(self, log: str) -> str:
        found = [self.folder / "logs" / log / name for name in ("stdout", "stderr")]
        return "".join(path.read_text(encoding="utf-8") for path in found)


def wait(condition: Any, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.timeout(900)
def test_a_federation_outlives_its_clients_and_its_server(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(site.server("first"))
        clients = {name: stack.enter_context(site.client(name)) for name in ("eyes", "ears", "both", "stranger")}
        clients["liar"] = stack.enter_context(
            site.runs("liar", LIAR, "liar.yaml", site.address, "liar", "ca.pem")
        )  # fmt: skip
        wait(lambda: site.rounds() or not first.is_alive())
        first.kill()
        clients["both"].kill()
        first.join()
        before = len(site.rounds())
        second = stack.enter_context(site.server("second"))
        wait(lambda: not second.is_alive())
        assert second.exitcode == 0, site.said("second")
        for name in ("eyes", "ears"):
            clients[name].join(30)
            assert clients[name].exitcode == 0, site.said(name)
    assert f"goes on after round {before}" in site.said("second")
    rounds = site.rounds()
    assert [found["number"] for found in rounds] == [1, 2, 3]
    for found in rounds:
        assert set(found["clients"]) <= {"eyes", "ears", "both"}
        assert "not finite" in found["refused"].get("liar", "not finite")
    assert any("liar" in found["refused"] for found in rounds)
    assert "stranger" not in json.dumps(rounds)
    model = AutoModelForMultimodalLM.from_pretrained(tmp_path / "model")
    adapter = PeftModel.from_pretrained(model, tmp_path / "out")
    assert any(value.any() for name, value in adapter.state_dict().items() if "lora_B" in name)


@pytest.mark.timeout(900)
def test_masked_changes_add_up_between_processes_and_one_is_killed_in_the_middle(tmp_path: Path) -> None:
    from chorus_moe.training.federated.learner import Learner
    from chorus_moe.training.federated.masked_sums import STEP
    from chorus_moe.training.federated.rounds import Federation
    from chorus_moe.training.federated.simulate import InProcess
    from chorus_moe.training.recipe import read_recipe
    from chorus_moe.training.train import load_or_build

    names, bound = ("eyes", "ears", "both"), 10.0
    site = Site(
        tmp_path, BANKS, rounds=2, round_seconds=90, secure_aggregation=True, max_update_norm=bound, max_examples=10
    )
    for name in names:
        # Clients that send nothing but masked changes.
        recipe = yaml.safe_load((tmp_path / f"{name}.yaml").read_text(encoding="utf-8"))
        site.write(name, recipe | {"federated": {"secure_aggregation": True}})
    plain = ["--insecure"]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            site.runs("server", PATIENT, "federated", "server", "server.yaml", "--listen", site.address, *plain)
        )
        for name in names[:2]:
            words = ["federated", "client", f"{name}.yaml", "--server", site.address, *plain]
            stack.enter_context(site.runs(name, COMMAND, *words))
        stack.enter_context(site.runs("both", QUITTER, "both.yaml", site.address))
        wait(lambda: not server.is_alive(), 600)
        assert server.exitcode == 0, site.said("server")
    first, second = site.rounds()
    assert len(first["masked"]) == 3 and len(second["masked"]) == 2 and len(second["refused"]) == 1
    assert not first["clients"] and not first["refused"]
    # The same in this process, without masks: the first round with all three, the second without the one that died.
    recipe = read_recipe(tmp_path / "server.yaml")
    recipe.federated.secure_aggregation, recipe.federated.count_ratio = False, 1e9
    model, _ = load_or_build(recipe, None)  # type: ignore[arg-type]
    federation = Federation(model, recipe.federated, tmp_path / "plain")
    learners = {name: Learner.of(read_recipe(tmp_path / f"{name}.yaml")) for name in names}
    for learner in learners.values():
        learner.recipe.federated.secure_aggregation = False
    answers = {name: by_rows(learner.answer) for name, learner in learners.items()}
    federation._round(InProcess(answers))
    del answers["both"]
    federation._round(InProcess(answers))
    masked, _ = unpack((tmp_path / "out" / "federated.safetensors").read_bytes())
    for name, tensor in federation.held.weights.items():
        # Rounding of each client over the smallest weight that stands alone, 2 rows of 10. In the second round training
        # begins at weights that differ by that, and Adam's first steps are as long as the rate wherever they lead.
        difference = (masked["weights/"][name] - tensor).abs()
        assert difference.max() <= 4 * 2 * 0.01, name
        assert difference.median() <= 2 * bound * STEP * 3 / 0.2, name
