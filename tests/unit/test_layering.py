"""Who may import whom, read from the source: words < records < machines < doors < processes < face. Imports point left only."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "zray"

# What machines must never touch: the world is told to them.
WORLD = {
    "zmq",
    "threading",
    "socket",
    "time",
    "subprocess",
    "selectors",
    "select",
    "signal",
    "multiprocessing",
    "asyncio",
    "zray._store",
}

WORDS = {"errors", "ids", "clock"}
RECORDS = {
    "task",
    "resources",
    "options",
    "placing",
    "object_ref",
    "wire",
    "serialization",
    "serializability",
    "failures",
    "call_signature",
}
_BROKER_MACHINES = """
    actions actor_events actor_log actor_table bundles cancelling dependencies dispatch events group_events head_watch jobs leases ledger lending locations
    membership node pace packing peer_messages peers placement placement_groups pull recovery refusals relay reliable scheduler second_copies
    serving
    settings task_events task_table told_rows unsent
    worker_pool
"""
_GCS_MACHINES = "faults limits lineage_log messages shard sharding tables task_batches task_rows topics"
_REPLICATION_MACHINES = "chain client configuration council faults member messages sessions state timing"
MACHINES = {
    "call_order",
    *(f"broker.{name}" for name in _BROKER_MACHINES.split()),
    *(f"gcs.{name}" for name in _GCS_MACHINES.split()),
    *(f"gcs.replication.{name}" for name in _REPLICATION_MACHINES.split()),
}
_LAUNCHER_PURE = "bootstrap config facts hostlist output plan rows templates yaml_text"
LAUNCHER_PURE = {f"launcher.{name}" for name in _LAUNCHER_PURE.split()}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    """Names of modules a file imports when it runs (imports for type checkers only are left out)."""
    found: set[str] = set()

    def walk(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                walk(node.orelse)
                continue
            if isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
                if node.module == "zray" or node.module.startswith("zray."):
                    found.update(f"{node.module}.{alias.name}" for alias in node.names)
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    walk([child])

    walk(ast.parse(path.read_text()).body)
    return found


FILES = {module_of(path): path for path in ROOT.rglob("*.py")}


def test_the_lists_here_name_files_that_exist() -> None:
    missing = (WORDS | RECORDS | MACHINES | LAUNCHER_PURE) - set(FILES)
    assert not missing, f"no such modules: {sorted(missing)}"


@pytest.mark.parametrize("name", sorted(MACHINES | LAUNCHER_PURE))
def test_machines_touch_nothing_of_the_world(name: str) -> None:
    used = {imported for imported in imports_of(FILES[name]) if imported in WORLD or imported.split(".")[0] in WORLD}
    assert not used, f"{name} imports {sorted(used)}"


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_machines_import_words_records_and_machines_only(name: str) -> None:
    allowed = WORDS | RECORDS | MACHINES
    for imported in imports_of(FILES[name]):
        if imported.startswith("zray."):
            tail = imported.removeprefix("zray.")
            fits = tail in allowed or tail.rpartition(".")[0] in allowed or tail in ("broker", "gcs", "gcs.replication")
            assert fits, f"{name} imports {imported}"


def test_only_the_transports_import_zmq() -> None:
    users = {name for name, path in FILES.items() if any(i.split(".")[0] == "zmq" for i in imports_of(path))}
    assert users == {"transport", "peer_transport"}


def test_words_import_no_other_part_of_zray() -> None:
    for name in WORDS:
        for imported in imports_of(FILES[name]):
            if imported.startswith("zray."):
                assert imported.removeprefix("zray.").split(".")[0] in WORDS, f"{name} imports {imported}"


def test_the_face_imports_no_broker_machine() -> None:
    for name in ("api", "session", "worker", "submission", "remote_function", "actor", "execution"):
        used = {i for i in imports_of(FILES[name]) if i.removeprefix("zray.") in MACHINES - {"call_order"}}
        assert not used, f"{name} imports {sorted(used)}"


@pytest.mark.parametrize("name", sorted(LAUNCHER_PURE))
def test_what_the_launcher_decides_imports_only_what_is_as_pure(name: str) -> None:
    used = {imported for imported in imports_of(FILES[name]) if imported.startswith("zray.")}
    modules = {imported for imported in used if imported.removeprefix("zray.") in FILES}
    assert modules <= {f"zray.{other}" for other in LAUNCHER_PURE}, sorted(modules)


def test_the_program_for_hosts_is_made_of_the_standard_library() -> None:
    for name, path in FILES.items():
        if name.startswith("launcher.remote."):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    foreign = {alias.name.split(".")[0] for alias in node.names} - sys.stdlib_module_names
                    assert not foreign, f"{name} imports {foreign}"
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    assert node.module is not None
                    assert node.module.split(".")[0] in sys.stdlib_module_names, f"{name} imports {node.module}"


def test_nothing_else_imports_the_launcher() -> None:
    users = {name for name, path in FILES.items() if any(i.startswith("zray.launcher") for i in imports_of(path))}
    assert {name for name in users if not name.startswith("launcher")} == set()


def test_every_module_says_what_it_covers() -> None:
    for name, path in FILES.items():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{name} has no docstring"
