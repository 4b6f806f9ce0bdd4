"""Every Python block and command of README and docs runs as pasted, page by page, in a folder of its own.

Small local parents stand in place of the public names. A block that has a `title` is a file, which is written. The
guides start from the folder that the README's blocks leave behind.
"""

import ast
import re
import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.parents import SIZES, PreTrainedTokenizerFast, plain_tokenizer, save_audio_parent, save_vision_parent

ROOT = Path(__file__).parent.parent
PUBLIC = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "text",
    "google/siglip-base-patch16-224": "vision",
    "openai/whisper-tiny": "audio",
}
# Commands that are not run here, each with the reason.
EXCLUDED = {
    "make": "sets up its own environment; CI calls it",
    "pip": "installs",
    "git": "needs the network",
    "chorus-moe serve": "runs until it is stopped; tests/serving runs it",
    "bash serving/vllm/environment.sh": "installs",
    "vllm-env/bin/python": "runs until it is stopped; tests/serving/vllm runs it",
    "chorus-moe chat": "waits for a person; tests/serving runs it",
    "chorus-moe page": "runs until it is stopped; tests/serving runs it",
    "chorus-moe federated server": "waits for clients; tests/training/federated/test_flower.py runs it",
    "chorus-moe federated client": "waits for a server; tests/training/federated/test_flower.py runs it",
    "chorus-moe plan 671b": "takes a minute; tests/training/scale/test_plan.py runs a small one",
    "chorus-moe plan 30b": "takes a minute; tests/training/scale/test_plan.py runs a small one",
    "chorus-moe export-graphs": "takes minutes; `.ci/matrix export` runs it",
    "python harness.py": "needs lm-eval; `.ci/matrix harness` runs its part",
    "python -m lmms_eval": "needs lmms-eval, which wants an environment of its own",
    "export TORCH": "sets a variable of torchrun",
    "torchrun": "starts several processes; tests/journeys/test_layouts.py does",
    "python -m benchmarks": "takes minutes; tests/test_benchmarks.py runs them small",
}
if find_spec("flwr") is None:
    EXCLUDED["chorus-moe federated simulate secure.yaml"] = "needs Flower; `.ci/matrix federated` runs the page with it"
# Pages followed by tests of their own.
OTHER_TESTS = {"docs/guides/add_a_router.md", "docs/guides/add_a_head.md", "docs/guides/add_a_modality.md"}
HISTORY = {"docs/log.md"}
# Pages whose code needs a package that is not in `dev`; a set of `.ci/matrix` runs them.
NEEDS = {"docs/guides/privacy.md": "opacus"}
# Pages that start in an empty folder, as the README does.
FROM_NOTHING = {"docs/quickstart.md"}
FENCE = re.compile(r"^```(\w+)?([^\n]*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    title: str | None
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        title = re.search(r'title="([^"]+)"', match[2])
        line = text.count("\n", 0, match.start(3)) + 1
        found.append(Block(match[1] or "", title and title[1], match[3], line))
    return found


def pages() -> list[str]:
    names = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    return [name for name in names if name not in OTHER_TESTS | HISTORY and blocks(ROOT / name)]


def save_deep_text_parent(folder: Path) -> None:
    """As many layers as the public model has, so that layer numbers in the pages hold."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer: PreTrainedTokenizerFast = plain_tokenizer()
    sizes = SIZES | {"num_hidden_layers": 30, "num_key_value_heads": 1, "max_position_embeddings": 2048}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("parents")
    save_deep_text_parent(folder / "text")
    save_vision_parent("siglip", folder / "vision")
    save_audio_parent("whisper", folder / "audio")
    return {name: str(folder / part) for name, part in PUBLIC.items()}


def run_page(name: str, folder: Path, parents: dict[str, str]) -> None:
    """Run the blocks in order, the Python ones in one namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks(ROOT / name):
            code = block.code
            for public, path in parents.items():
                code = code.replace(public, path)
            if block.title is not None:
                Path(block.title).write_text(code, encoding="utf-8")
            elif block.language == "python":
                tree = ast.parse(code, filename=name)
                exec(compile(ast.increment_lineno(tree, block.line - 1), name, "exec"), names)
            elif block.language == "bash":
                run_commands(name, code)
            else:
                assert block.language in ("text", "yaml"), f"{name}:{block.line}: {block.language!r} is not known"


def run_commands(name: str, code: str) -> None:
    from chorus_moe.serving.commands import app

    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words or any(" ".join(words).startswith(excluded) for excluded in EXCLUDED):
            continue
        assert words[0] == "chorus-moe", f"{name}: neither chorus-moe nor in EXCLUDED: {line}"
        status = app(words[1:], standalone_mode=False)
        assert not status, f"{name}: status {status} of {line}"


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory: pytest.TempPathFactory, parents: dict[str, str]) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    run_page("README.md", folder, parents)
    return folder


@pytest.mark.slow
def test_the_readme_runs_as_pasted(after_readme: Path) -> None:
    assert (after_readme / "my-adapter" / "adapter_config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", pages())
def test_a_page_runs_as_pasted(name: str, after_readme: Path, parents: dict[str, str], tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed: .ci/matrix has a set with it")
    if name in FROM_NOTHING:
        (tmp_path / "work").mkdir()
    else:
        shutil.copytree(after_readme, tmp_path / "work")
    run_page(name, tmp_path / "work", parents)


def test_the_reference_lists_every_operation() -> None:
    from chorus_moe import surgery

    listed = re.findall(r"^::: chorus_moe\.surgery\.(\w+)$", (ROOT / "docs/reference/api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(surgery.__all__)


def test_the_doctors_guide_lists_every_check() -> None:
    from chorus_moe.training.doctor.checks import CHECKS, COPYING, name_of

    page = (ROOT / "docs/guides/doctor.md").read_text()
    rows = [match for match in re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE) if not match.startswith("--")]
    assert rows == [name_of(check) for check in CHECKS]
    quick = next(line for line in page.splitlines() if line.startswith("| `--quick`"))
    assert re.findall(r"`([a-z-]+)`", quick)[1:] == [name_of(check) for check in COPYING]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
