"""The floors of the house: a room imports only downwards, also inside a room, and nothing runs in a circle."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import outlast

FLOORS = [
    {"__main__"},
    {"cli", "integrations"},
    {"trainer"},
    {"session"},
    {"launch"},
    {"comm", "checkpoint", "diagnostics"},
    {"config", "config_tables", "deepspeed_compat", "events", "errors", "free_port", "lazy", "plain_text"},
]
"""Top to bottom. A room imports from lower floors; on the ground floor also from its neighbours."""

INNER_FLOORS: dict[str, list[set[str]]] = {
    "checkpoint": [
        {"convert", "deepspeed"},
        {"attach", "load"},
        {"tools", "checkpointer"},
        {"start", "ending", "begin"},
        {"restore"},
        {"tiers"},
        {"save"},
        {"steps", "ownership"},
        {"storage", "state"},
        {"format"},
        {"memory", "peers", "auto_interval", "rng"},
        {"config", "durability", "process_exit", "shortage"},
    ],
    "comm": [
        {"attach"},
        {"deepspeed", "fsdp"},
        {"ddp"},
        {"auto", "reducer"},
        {"exchange"},
        {"state"},
        {"direction", "analysis", "testing"},
        {"feedback"},
        {"slices"},
        {"compressors"},
        {"kernels", "buffers", "transport"},
        {"config"},
    ],
    "diagnostics": [
        {"export", "page"},
        {"trace"},
        {"doctor", "report"},
        {"monitor", "numerics", "probes"},
        {"syndromes"},
        {"live"},
        {"beside", "formatting", "config", "port_token", "wsgi"},
    ],
    "launch": [
        {"launcher"},
        {"agent", "plan", "rendezvous_errors"},
        {"control"},
        {"rendezvous", "trusted_rendezvous"},
        {"hung_ranks", "node_watch", "other_nodes", "notice_spread", "rounds", "slow_ranks", "step_watch"},
        {"first_cause", "joining", "node_exchange", "node_trials", "standstill_probe", "notice_relay", "notice_store"},
        {"exporting", "serving_page", "goodput", "processes", "program_runs", "standby"},
        {"flag_sources", "hang_watch", "node_probe", "notice", "rank_output", "runner", "spec", "torch_options"},
        {"notice_signals"},
        {"failures", "place"},
        {
            "activity",
            "backoff",
            "beside",
            "flags",
            "imports",
            "lasting_output",
            "program",
            "node_clocks",
            "orphans",
            "ports",
            "rank_records",
            "run_directory",
            "sealed",
            "suspicions",
        },
        {"attempt", "oom_killer", "slurm", "parent_death", "config"},
    ],
    "trainer": [
        {"__main__"},
        {"main"},
        {"build"},
        {"loop"},
        {"run", "summary"},
        {"engines"},
        {"parts"},
        {"sources"},
        {"streams"},
        {"optim", "data", "model", "factories", "batches", "blocks", "token_files", "tokenize"},
        {"run_directory"},
        {"saved_settings", "logs", "progress", "rng"},
        {"config"},
    ],
    "session": [
        {"session"},
        {"checkpoints", "joining", "numerics", "saved_parts", "step_record"},
        {"place", "settings", "state"},
        {"compression", "trainable"},
        {"deepspeed", "scheduled_checkpoints"},
        {"agreement", "checkpoint_schedule"},
        {"buffers", "failure_history", "models", "process_group"},
        {"start_keys"},
    ],
    "integrations": [
        {"accelerate", "huggingface", "lightning"},
        {"lightning_data", "lightning_limits", "lightning_state", "session_callback"},
        {"trainer_state", "wrappers"},
    ],
    "cli": [
        {"main"},
        {"ckpt", "config", "doctor", "launch", "launch_program", "predict", "report", "status", "tokenize", "train"},
        {"program_config", "verb"},
    ],
}
"""Top to bottom, the folders and files of a room: each imports only from floors below its own."""

PACKAGE = Path(__file__).parent.parent / "outlast"
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The module's dotted name."""
    return ".".join(("outlast", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


def imports(path: Path) -> Iterator[str]:
    """The modules of outlast that a file imports, whenever it does so; not those imported for types alone."""
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in MODULES:
                    yield inner
                elif node.module in MODULES and node.module != "outlast":
                    yield node.module


GRAPH = {name: set(imports(path)) - {name} for name, path in MODULES.items()}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Ways through the graph that come back to where they began, one for each node that is on one."""
    found = []
    for start in graph:
        ways, seen = [[start]], set()
        while ways:
            way = ways.pop()
            for there in sorted(graph[way[-1]]):
                if there == start:
                    found.append([*way, start])
                    ways.clear()
                    break
                if there not in seen and there in graph:
                    seen.add(there)
                    ways.append([*way, there])
    return found


def floors_of(floors: list[set[str]]) -> dict[str, int]:
    return {place: floor for floor, places in enumerate(floors) for place in places}


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"], ["c", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_file_imports_itself_through_others() -> None:
    assert circles(GRAPH) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_downwards(path: Path) -> None:
    rooms = floors_of(FLOORS)
    name = name_of(path)
    others = {module.split(".")[1] for module in GRAPH[name]}
    if name == "outlast":
        assert others == {"lazy"}  # the rooms are imported when they are asked for
        return
    room = name.split(".")[1]
    for other in others - {room}:
        same_ground = {room, other} <= FLOORS[-1]
        assert same_ground or rooms[other] > rooms[room], f"{room} -> {other}"


@pytest.mark.parametrize("room", INNER_FLOORS)
def test_inside_a_room_imports_go_downwards(room: str) -> None:
    floors = floors_of(INNER_FLOORS[room])
    inside = {name: name.split(".")[2] for name in MODULES if name.startswith(f"outlast.{room}.")}
    assert set(inside.values()) == set(floors), "a folder or file of the room has no floor, or is gone"
    for name, place in inside.items():
        for other in GRAPH[name]:
            there = inside.get(other)
            assert other != f"outlast.{room}", f"{name} goes through its own room's front door"
            if there not in (None, place):
                assert floors[there] > floors[place], f"{name} -> {other}"


def test_the_ground_floor_leans_on_errors_alone() -> None:
    ground = {name: GRAPH[f"outlast.{name}"] for name in FLOORS[-1]}
    errors = {"outlast.errors"}
    assert ground == {
        "config": errors | {"outlast.config_tables"},
        "config_tables": errors,
        "deepspeed_compat": errors,
        "events": errors | {"outlast.plain_text"},
        "errors": set(),
        "free_port": set(),
        "lazy": set(),
        "plain_text": set(),
    }


UNTRUSTED = PACKAGE / "checkpoint" / "convert" / "safe_unpickle.py"
"""Reads pickles of others, for import."""
EXPORTER = PACKAGE / "checkpoint" / "convert" / "torch_save.py"


def test_pickles_of_others_are_read_by_name_of_what_is_admitted_only() -> None:
    used = {"pickle": set(), "torch": set()}
    for node in ast.walk(ast.parse(UNTRUSTED.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in used:
            used[node.value.id].add(node.attr)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
            said = {word.arg: word.value for word in node.keywords}
            assert not said or (isinstance(said["weights_only"], ast.Constant) and said["weights_only"].value is True)
    assert used == {"pickle": {"UnpicklingError"}, "torch": {"load", "dtype"}}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_pickled_and_nothing_swallowed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            found = {"pickle", "dill", "cloudpickle", "shelve", "marshal"} & {n.split(".")[0] for n in names}
            assert found <= ({"pickle"} if path == UNTRUSTED else set())
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load") or path == UNTRUSTED
            assert (node.value.id, node.attr) != ("torch", "save") or path == EXPORTER
            assert not (node.value.id == "dist" and node.attr.endswith("_object_list")), node.attr
            assert (node.value.id, node.attr) not in {("dist", "all_gather_object"), ("dist", "gather_object")}
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: bare except"
            body = [n for n in node.body if not isinstance(n, ast.Pass)]
            broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            assert body or not broad, f"{path}:{node.lineno}: swallows everything"


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_outlast_imports_no_room_and_no_torch() -> None:
    loaded = "[m for m in sys.modules if m.startswith('outlast.') or m == 'torch']"
    assert run(f"import sys, outlast; dir(outlast); print({loaded})") == "['outlast.lazy']"


def test_a_room_is_imported_when_it_is_used() -> None:
    assert run("import outlast; print(outlast.comm.attach.__name__, outlast.checkpoint.tools.verify.__name__)") == (
        "attach verify"
    )
    with pytest.raises(AttributeError, match="'outlast' has no attribute 'chekpoint'"):
        outlast.chekpoint  # noqa: B018
    assert set(outlast.__all__) == {"Session", "__version__", *FLOORS[2], *FLOORS[3], *FLOORS[4], *FLOORS[5]}


FACES = {
    "comm": {
        "Choice",
        "CollectiveObserver",
        "CommConfig",
        "Communicator",
        "GradientReducer",
        "ReduceStats",
        "Reducer",
        "attach",
    },
    "checkpoint": {
        "CheckpointConfig",
        "Checkpointer",
        "Interval",
        "AutoInterval",
        "Mismatch",
        "Restored",
        "attach",
        "check_like",
        "expected_mtbf_s",
        "load",
        "optimal_interval_s",
    },
    "diagnostics": {
        "DiagnosticsConfig",
        "Heartbeat",
        "Recorder",
        "Report",
        "build_report",
        "render_html",
        "render_terminal",
    },
    "launch": {"LaunchConfig", "LaunchFlags", "LaunchSpec", "Notice", "Place", "dry_run", "find_place", "launch"},
    "session": {"Session"},
    "integrations": set(),
    "trainer": {
        "GPT",
        "Config",
        "Corpus",
        "DDPEngine",
        "Engine",
        "Loader",
        "Run",
        "run_rank",
        "train",
    },
}
"""What each room shows at its front door."""


@pytest.mark.parametrize("room", FACES)
def test_a_room_shows_what_is_listed(room: str) -> None:
    face = importlib.import_module(f"outlast.{room}")
    assert set(face.__all__) == FACES[room]
    assert len(face.__all__) == len(FACES[room]) <= 12
    assert all(hasattr(face, name) for name in face.__all__)


def test_files_are_short() -> None:
    long = {str(p.relative_to(PACKAGE)): n for p in FILES if (n := len(p.read_text().splitlines())) > 450}
    assert not long


def test_the_loop_fits_on_one_screen() -> None:
    assert len((PACKAGE / "trainer" / "loop.py").read_text().splitlines()) <= 80
