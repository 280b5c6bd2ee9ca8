"""The recipes of `zray-cluster template`, run for real as far as one machine goes.

Covers that the batch script and the containers' commands make a cluster, run the program, and leave nothing. Slurm's own programs are played by
scripts here, and Kubernetes by starting each container's command in a network namespace; scheduling, volumes and probes are not covered.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests import namespaces
from tests.helpers import PROJECT, RUNTIME, SLACK, processes_under, wait_for
from tests.ssh_hosts import SshNetwork
from zray.launcher import templates

if TYPE_CHECKING:
    from collections.abc import Iterator


yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra: cluster)")
_MISSING = namespaces.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(_MISSING), reason=_MISSING)]

PROGRAM = """
import zray
zray.init()
@zray.remote
def square(x):
    return x * x
print("sum", sum(zray.get([square.remote(i) for i in range(100)])))
print("alive", sum(node["Alive"] for node in zray.nodes()), "cpus", zray.cluster_resources()["CPU"])
"""
# Runs a step's command once for each of its nodes, with a runtime directory for each; ends them when it is ended.
SRUN = """#!/bin/bash
nodes=1 kind=head
while [[ $1 == --* ]]; do
    [[ $1 == --nodes=* ]] && nodes=${1#*=}
    [[ $1 == --exclude=* ]] && kind=worker
    shift
done
trap 'kill $(jobs -p); wait; exit 143' TERM
for ((n = 0; n < nodes; n++)); do
    ZRAY_RUNTIME_DIR=$ZRAY_RUNTIME_DIR/$kind$n "$@" &
done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit $status
"""


@pytest.fixture
def network() -> Iterator[SshNetwork]:
    """Three namespaces, nothing listens in them."""
    made = SshNetwork()
    try:
        for name in ("head", "worker", "program"):
            made.add(name)
        yield made
    finally:
        made.close()


def tools(place: Path, **more: str) -> dict[str, str]:
    """Make a directory of programs; return an environment that finds them."""
    programs = place / "bin"
    programs.mkdir()
    python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
    zray = f'#!/bin/sh\nexec {sys.executable} -m zray.cli "$@"\n'
    for name, text in {"zray": zray, "python": python, **more}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (place / "my_program.py").write_text(PROGRAM)
    path = f"{programs}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name != RUNTIME}
    return {**kept, "PATH": path, "PYTHONPATH": str(PROJECT), "HOME": str(place)}


def test_the_batch_script_runs_a_program_on_all_nodes(network: SshNetwork, tmp_path: Path) -> None:
    environment = tools(tmp_path, srun=SRUN, scontrol="#!/bin/sh\nprintf 'one\\ntwo\\nthree\\n'\n")
    script = tmp_path / "job.sh"
    script.write_text(templates.text("slurm"))
    runtime = f"/tmp/zray-{os.getuid()}-{os.getpid()}"
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "3"}
    done = subprocess.run(
        network.command("bash", str(script)),
        env={**environment, **slurm, "SLURM_CPUS_PER_TASK": "1", "PROGRAM": "python my_program.py"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90 * SLACK,
        check=False,
    )
    try:
        assert done.returncode == 0, done.stdout + done.stderr
        assert "sum 328350" in done.stdout
        assert "alive 3 cpus 3.0" in done.stdout
        assert not list(tmp_path.glob(".zray-slurm*")), "the key is gone"
        places = [f"{runtime}/{name}" for name in ("head0", "worker0", "worker1")]
        wait_for(lambda: not [pid for place in places for pid in processes_under(place)], what="no process is left")
        assert not [path for place in places for path in Path(place).iterdir()], "no session is left"
    finally:
        subprocess.run(["rm", "-rf", runtime], check=True)


def containers() -> dict[str, dict[str, Any]]:
    """The containers of the manifests, by name."""
    found = {}
    for document in yaml.safe_load_all(templates.text("k8s")):
        if document["kind"] != "Service":
            [container] = document["spec"]["template"]["spec"]["containers"]
            found[container["name"]] = container
    return found


def test_manifests_fit_together() -> None:
    documents = list(yaml.safe_load_all(templates.text("k8s")))
    assert [document["kind"] for document in documents] == ["Service", "Deployment", "Deployment", "Job"]
    service, *rest = documents
    selector = service["spec"]["selector"].items()
    labels = [document["spec"]["template"]["metadata"]["labels"].items() for document in rest]
    assert [selector <= one for one in labels] == [True, False, False]
    for document in rest:
        pod = document["spec"]["template"]["spec"]
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert service["spec"]["ports"][0]["port"] == 6480
    assert all(f"{service['metadata']['name']}:6480" in containers()[name]["args"][0] for name in ("worker", "program"))


def test_the_containers_commands_make_a_cluster(network: SshNetwork, tmp_path: Path) -> None:
    environment = tools(tmp_path)
    (tmp_path / "secret").mkdir()
    subprocess.run(["zray", "key", str(tmp_path / "secret" / "cluster.key")], env=environment, check=True)
    running = {}
    head = network.hosts["head"].address
    root = Path(tempfile.mkdtemp(dir=os.environ[RUNTIME]))  # names of sockets need a short one
    try:
        for name, container in containers().items():
            place = root / name
            place.mkdir()
            text = container["args"][0].replace("/secret/", f"{tmp_path}/secret/").replace("/run/zray", str(place))
            running[name] = subprocess.Popen(
                network.command(
                    *container["command"], text.replace("zray-head", head), namespace=f"{network.prefix}-{name}"
                ),
                env={
                    **environment,
                    "POD_IP": network.hosts[name].address,
                    RUNTIME: str(place / "run"),
                    "STORAGE": f"sqlite:{place}/gcs.db",
                },
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            if name == "head":
                wait_for(lambda: list((root / "head").glob("run/*/node.json")), what="the head runs")
            elif name == "worker":
                wait_for(lambda: list((root / "worker").glob("run/*/node.json")), what="the worker runs")
        out, _ = running["program"].communicate(timeout=60 * SLACK)
        assert running["program"].returncode == 0, out
        assert "sum 328350" in out
        assert "alive 3 cpus 6.0" in out
    finally:
        # As Kubernetes ends containers; the shells have become the commands (exec), so the nodes get the signal.
        for name in ("worker", "head", "program"):
            if name in running:
                running[name].terminate()
                running[name].communicate(timeout=30)
    for name in running:
        assert not processes_under(str(root / name / "run"))
    shutil.rmtree(root)
