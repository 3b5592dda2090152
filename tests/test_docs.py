"""Every command in README and docs is run here, as it stands but for where it writes and how long it takes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from outlast.free_port import free_port
from tests.forked import run_main
from tests.helpers import clean_env, tiny_config
from tests.small_tokenizer import save_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

ELSEWHERE = {
    "outlast launch --nproc-per-node 2 train.py --lr 3e-4": "tests/launch/test_any_program.py, with its own script",
    "outlast launch --nproc-per-node 2 --run-dir runs/char_gpt examples/char_gpt.py runs/char_gpt": (
        "tests/session/test_example.py"
    ),
    "torchrun --standalone --nproc-per-node 2 examples/char_gpt.py runs/char_gpt": "tests/session/test_example.py",
    "mpirun -n 2 python examples/char_gpt.py runs/char_gpt": "tests/session/test_example.py",
    "outlast launch --nproc-per-node 2 --run-dir runs/lightning_module examples/lightning_module.py "
    "runs/lightning_module": "tests/integrations/test_examples.py",
    "outlast launch --nproc-per-node 2 --run-dir runs/hf_trainer examples/hf_trainer.py runs/hf_trainer": (
        "tests/integrations/test_examples.py"
    ),
    "outlast launch --nproc-per-node 2 --run-dir runs/accelerate examples/accelerate_loop.py runs/accelerate": (
        "tests/integrations/test_examples.py"
    ),
    "outlast launch --nproc-per-node 2 --export.prometheus-port 9464 train.py --lr 3e-4": (
        "tests/launch/test_exporting.py, on a free port"
    ),
    "outlast launch --nproc-per-node 2 --page.port 8080 --run-dir runs/live train.py": (
        "tests/launch/test_serving_page.py, on a free port"
    ),
    "outlast report runs/stdlib_gpt --live": "tests/launch/test_serving_page.py: it serves until it is interrupted",
    "outlast doctor --nodes 4 --node 2 --meet node0:29511": "tests/launch/test_node_probe.py, on four emulated hosts",
    "outlast report runs/train": "tests/launch/test_any_program.py",
    "outlast launch configs/gpt2.toml --nproc-per-node 2": "tests/trainer/test_foreign_ddp.py, smaller",
    "make train": "tests/test_first_run.py",
    "make test": "this very suite",
    "make check": "tests/test_docs.py::test_make_check_is_what_it_says and .ci/run",
    "pip install .": "tests/test_first_run.py, as a wheel in an empty environment",
    "mpirun -n 2 outlast train configs/stdlib_gpt.toml": "tests/launch/test_place.py, with flags for root",
    "sbatch slurm/train.sbatch configs/stdlib_gpt.toml": "tests/launch/test_slurm.py, on a real Slurm",
    "sbatch --nodes 4 --gpus-per-node 8 slurm/launch.sbatch configs/stdlib_gpt.toml": "tests/launch/test_slurm.py",
    "torchrun --nproc-per-node 2 examples/own_loop.py runs/own_loop": "tests/test_own_loop.py",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --standalone --nproc-per-node 2 --max-restarts 4 "
    "examples/own_loop.py runs/own_loop": "tests/test_own_loop.py",
    "torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend outlast --rdzv-endpoint /shared/meet --rdzv-id job7 "
    "train.py": "tests/launch/control/test_torchrun.py, in a folder of its own",
}


def commands() -> list[str]:
    blocks = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.S)]
    return list(dict.fromkeys(line for block in blocks for line in block.splitlines() if line.strip()))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the checkout, whose config takes seconds, with one finished run."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "configs").mkdir()
    config, _ = tiny_config(folder)
    text = re.sub(r'dir = ".*"\n', "", config.read_text()).replace('name = "tiny"', 'name = "stdlib_gpt"')
    (folder / "configs" / "stdlib_gpt.toml").write_text(text)
    (folder / "texts").mkdir()
    texts = [f"text number {number}\n" for number in range(100)]
    for number, one in enumerate(texts):
        (folder / "texts" / f"{number}.txt").write_text(one)
    save_tokenizer(folder / "tokenizer.json", texts)
    return folder


def run(folder: Path, command: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = shlex.split(command)
    if words[0] == "torchrun":
        words[1:1] = ["--master-port", str(free_port())]
    env = clean_env(PATH=path)
    if words[0] == "outlast" and words[1] != "launch":  # the console script stands for what is forked here
        done = run_main("outlast.cli", words[1:], env=env, timeout_s=120, cwd=folder)
    else:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


TRAINING = [c for c in commands() if re.match(r"(outlast launch|outlast train|torchrun)\b", c) and c not in ELSEWHERE]
LOOKING = [c for c in commands() if c not in ELSEWHERE and c not in TRAINING]


@pytest.mark.parametrize("command", TRAINING)
def test_commands_that_train(place: Path, command: str) -> None:
    shutil.rmtree(place / "runs", ignore_errors=True)
    assert "held-out loss" in run(place, command)


@pytest.mark.parametrize("command", LOOKING)
def test_commands_that_look(place: Path, command: str) -> None:
    if not (place / "runs").exists():
        run(place, "outlast launch configs/stdlib_gpt.toml --nproc-per-node 2")
    assert run(place, command).strip() or re.search(r"--(html|trace) ", command)


def test_nothing_is_listed_that_is_not_there() -> None:
    known = set(commands())
    assert set(ELSEWHERE) <= known
    assert TRAINING
    assert LOOKING
    for target in ("train", "test", "check"):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


def anchors(page: Path) -> set[str]:
    """What links to a page's headings say after the ``#``, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
            if "://" in target:
                continue
            there = page.parent / target if target else page
            assert there.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(there), f"{page.name}: {target}#{anchor}"


def test_paths_lead_somewhere() -> None:
    """``NAME`` stands for a file that a reader adds."""
    tops = "outlast|tests|docs|benchmarks|examples|slurm"
    for page in PAGES:
        for path in re.findall(rf"`((?:{tops})/[\w./-]*)(?:::\w+)?`", page.read_text()):
            assert "NAME" in path or (ROOT / path).exists(), f"{page.name}: {path}"


def test_every_room_and_folder_is_named() -> None:
    """docs/architecture.md has a place for each folder, and for none that is gone."""
    package = ROOT / "outlast"
    folders = {str(path.parent.relative_to(package)) for path in package.glob("*/__init__.py")}
    folders |= {str(path.parent.relative_to(package)) for path in package.glob("*/*/__init__.py")}
    cells = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "docs" / "architecture.md").read_text(), flags=re.M)
    named = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    assert folders <= named
    missing = {name for name in named if not any((package / f"{name}{end}").exists() for end in ("", ".py"))}
    assert not missing


def test_make_check_is_what_it_says() -> None:
    """mypy --strict and ruff, over everything."""
    for tool in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        done = subprocess.run(
            [sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, f"{tool}\n{done.stdout[-3000:]}"
    assert "strict = true" in (ROOT / "pyproject.toml").read_text()


def test_the_project_names_no_machine() -> None:
    pages = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "pyproject.toml", *(ROOT / "outlast").rglob("*.py")]
    for page in pages:
        assert not re.search(r"/(root|home|work|tmp)/", page.read_text()), page


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of the docs, drawn anew."""
    folder = tmp_path_factory.mktemp("pictures")
    subprocess.run([sys.executable, ROOT / "docs" / "make_pictures.py", folder], check=True, timeout=60)
    return folder


@pytest.mark.parametrize("picture", ["rooms.svg", "step.svg", "time_to_loss.svg"])
def test_pictures_show_what_is_there(pictures: Path, picture: str) -> None:
    drawn = (pictures / picture).read_text(encoding="utf-8")
    assert drawn == (ROOT / "docs" / picture).read_text(encoding="utf-8"), "run python docs/make_pictures.py"
    assert ElementTree.fromstring(drawn).get("viewBox")
