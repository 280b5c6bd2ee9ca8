"""The command line: `zray start`, `zray stop`, `zray status`, `zray key`, `zray demo`, `zray microbenchmark`, `zray version`.

Covers arguments and exit codes only; each command imports what it runs when it is run, so that `zray --help` stays
quick. Neighbours: `zray.node`, `zray.demo`, `zray.microbenchmark`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from zray.node import Node


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Tasks, actors and shared objects for Python."""


@main.command()
def version() -> None:
    """Print the versions of zray, Python and the packages that matter in a report."""
    import platform
    from importlib import metadata

    for package in ("zray", "pyzmq", "cloudpickle", "msgspec", "numpy"):
        click.echo(f"{package} {metadata.version(package)}")
    click.echo(f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}")


def _address(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    """Check host:port."""
    if value:
        from zray.node import is_address

        if not is_address(value):
            raise click.BadParameter(f"{value!r} is not host:port (an IPv6 address stands in brackets: [fd00::1]:6400)")
    return value


def _mapping(_context: click.Context, _parameter: click.Parameter, value: str) -> dict[str, Any]:
    """Check a JSON object."""
    try:
        found = json.loads(value or "{}")
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}") from None
    if not isinstance(found, dict):
        raise click.BadParameter("not a JSON object")
    return found


@main.command()
@click.option("--head", is_flag=True, help="Begin a new cluster.")
@click.option("--address", default="", callback=_address, metavar="HOST:PORT", help="Join the cluster with this head.")
@click.option("--host", help="Address to listen on, where other nodes find this one.  [default: that of the way out]")
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Port to listen on.  [default: any free one]")
@click.option("--key", type=click.Path(dir_okay=False), envvar="ZRAY_CLUSTER_KEY", help="Key file of the cluster.")
@click.option("--num-cpus", type=click.FloatRange(min=0), help="[default: what this process may use]")
@click.option("--num-gpus", type=click.FloatRange(min=0), help="[default: what this process may use]")
@click.option("--memory", type=click.IntRange(min=0), help="Bytes that tasks may ask for.")
@click.option("--object-store-memory", type=click.IntRange(min=1 << 20), help="Bytes of the object store.")
@click.option("--resources", default="", callback=_mapping, metavar="JSON", help="Custom resources, name to amount.")
@click.option("--labels", default="", callback=_mapping, metavar="JSON", help="Labels of the node.")
@click.option(
    "--node-timeout",
    default=30.0,
    show_default=True,
    type=click.FloatRange(min=0.5),
    help="Seconds of silence after which the head takes a node for dead, and a node the head for lost.",
)
@click.option(
    "--storage",
    default="memory",
    show_default=True,
    metavar="WHERE",
    help="Head: where its tables survive it: memory, sqlite:PATH or redis://... .",
)
@click.option(
    "--head-grace",
    type=click.FloatRange(min=0),
    help="Head: seconds for which other nodes outlive it and ask for it.  [default: 60 with storage or replicas, else 0]",
)
@click.option(
    "--replicas",
    default=1,
    type=click.IntRange(min=1),
    metavar="1|3",
    help="Head: with 3 the next two nodes keep its tables, too, and one of them becomes the head when it dies.",
)
@click.option("--block", is_flag=True, help="Stay, and end the node when this command is ended (for srun, containers).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def start(
    head: bool,
    address: str,
    host: str | None,
    port: int,
    key: str | None,
    num_cpus: float | None,
    num_gpus: float | None,
    memory: int | None,
    object_store_memory: int | None,
    resources: dict[str, float],
    labels: dict[str, str],
    node_timeout: float,
    block: bool,
    as_json: bool,
    storage: str,
    head_grace: float | None,
    replicas: int,
) -> None:
    """Start a node of a cluster on this machine; it runs until `zray stop`.

    The head makes a key for its cluster (or takes --key); other machines need a copy of that file.
    """
    if head == bool(address):
        raise click.UsageError("either --head or --address HOST:PORT")
    from zray import errors
    from zray import node as nodes

    if address and not key:
        key = next((node.record.key_file for node in nodes.running_nodes() if node.record.head == address), None)
        if key is None:
            raise click.UsageError("--key FILE is needed: a copy of the key file that `zray start --head` has named")
    settings = nodes.NodeSettings(num_cpus, num_gpus, memory, resources, object_store_memory, labels)
    from zray.gcs.storage import check_name

    try:
        check_name(storage)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--storage") from None
    if address and (storage != "memory" or head_grace is not None):
        raise click.UsageError("--storage and --head-grace are the head's: only the head keeps tables")
    if address and replicas != 1:
        raise click.UsageError("--replicas is the head's: it asks the nodes that join to keep copies of its tables")
    try:
        nodes.check_replicas(replicas, storage, nodes.HEAD_GRACE_S if head_grace is None else head_grace)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    place = nodes.ClusterSettings(
        (host or nodes.own_address(address)).strip("[]"),
        port,
        address,
        key or "",
        node_timeout,
        storage,
        head_grace,
        replicas,
    )
    try:
        # A node that is waited for must not outlive who waits, whatever ends that.
        started = nodes.start(settings, os.getpid() if block else 0, place)
    except (errors.ZraySystemError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    record = started.record
    asked = _catch_signals() if block else None
    if as_json:
        told = {"node": record.node, "address": record.address, "head": record.head, "key": record.key_file}
        click.echo(json.dumps({**told, "pid": record.broker_pid}))
    else:
        click.echo(f"node {record.node[:8]} listens on {record.address}, process {record.broker_pid}")
        if head:
            click.echo(f"key       {record.key_file}")
            click.echo(
                f"join      zray start --address {record.address} --key FILE   (a copy of the key, on the other machine)"
            )
        click.echo(f'use       zray.init(address="{record.head}")')
        click.echo(f"end       {'Ctrl-C' if block else 'zray stop'}")
    if asked is not None:
        _wait_for_node(started, asked)


def _catch_signals() -> threading.Event:
    """Return what is set when this process is asked to end. Before anybody is told that the node runs: they may ask at once."""
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: asked.set())
    return asked


def _wait_for_node(node: Node, asked: threading.Event) -> None:
    """Wait until the node ends, or end it when this process is asked to end. Exits with 1 when it ended by itself."""
    # In a container this may be process 1: then orphans of the node's workers come here, and somebody has to wait for them.
    reaps = os.getpid() == 1
    while not asked.wait(0.2):
        if node.process.poll() is not None:
            break
        while reaps and (gone := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if gone.si_pid == node.process.pid:
                break
            os.waitpid(gone.si_pid, 0)
    ended_by_itself = not asked.is_set()
    node.stop()
    if ended_by_itself:
        raise SystemExit(1)


@main.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def key(file: Path) -> None:
    """Make a key for a cluster, in a FILE that only you can read; `zray start --key FILE` takes it.

    `zray start --head` makes one by itself; this is for where all nodes start at the same time (a batch system, Kubernetes).
    """
    from zray.peer_transport import ClusterKey

    if file.exists():
        raise click.ClickException(f"{file} is there already; it may be a running cluster's")
    try:
        ClusterKey.new().write(str(file))
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}") from None
    click.echo(f"wrote {file}")


@main.command()
@click.option("--address", default="", callback=_address, metavar="HOST:PORT", help="Only nodes of this cluster.")
def stop(address: str) -> None:
    """End all nodes of clusters that this user has started on this machine."""
    from zray import node as nodes

    running = [node for node in nodes.running_nodes() if not address or node.record.head == address]
    # The head last: the others leave it in order.
    running.sort(key=lambda node: node.record.head == node.record.address)
    for node in running:
        ended = nodes.end(node)
        click.echo(
            f"node {node.record.node[:8]} at {node.record.address} {'has ended' if ended else 'had to be killed'}"
        )
    if not running:
        click.echo("no node runs here")


@main.command()
@click.option("--address", default="auto", metavar="HOST:PORT", help="Of the cluster's head.  [default: the one here]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Show the scheduler's books of the node connected to, too.")
def status(address: str, as_json: bool, verbose: bool) -> None:
    """Show the nodes of a cluster, programs connected from outside, and what is free; with -v every unfinished task that the scheduler of the
    node connected to knows, where it is and what it waits for."""
    import zray

    try:
        zray.init(address=address, log_to_driver=False)
    except (zray.exceptions.ZrayError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    try:
        nodes, total, free = zray.nodes(), zray.cluster_resources(), zray.available_resources()
        place, clients = zray.api.query("cluster"), zray.api.query("clients")
        books = zray.api.query("books") if verbose else {}
    finally:
        zray.shutdown()
    if as_json:
        found = {"nodes": nodes, "total": total, "available": free, "cluster": place, "clients": clients}
        click.echo(json.dumps({**found, "books": books} if verbose else found))
        return
    for node in nodes:
        mark = " (head)" if node.get("is_head") else ""
        reason = f": {node['reason']}" if node.get("reason") else ""
        has = ", ".join(f"{name} {amount:g}" for name, amount in _shown(node.get("Resources", {})))
        click.echo(f"{node['NodeID'][:8]}  {node.get('address', ''):<22} {node['state']}{mark}{reason}  {has}")
    for client in clients:
        click.echo(f"{client['NodeID'][:8]}  {client['NodeManagerHostname']:<22} {client['state']} (a program outside)")
    failure = f" ({place['storage_failure']})" if place["storage_failure"] else ""
    click.echo(f"storage: {place['storage']}{failure}")
    if place["replicas"]:
        kept = ", ".join(node[:8] for node in place["replicas"])
        council = ", ".join(node[:8] for node in place["council"])
        wanted = place["replicas_wanted"]
        click.echo(
            f"tables on {len(place['replicas'])} of {wanted} nodes: {kept}; council: {council}; epoch {place['epoch']}"
        )
    if place["head_lost"]:
        click.echo(f"the head is lost: {place['head_lost']}")
    click.echo("free: " + ", ".join(f"{name} {free.get(name, 0.0):g} of {amount:g}" for name, amount in _shown(total)))
    for book, lines in books.items():
        for line in lines:
            click.echo(f"{book}: {line}")


def _shown(resources: dict[str, float]) -> list[tuple[str, float]]:
    """Resources that people ask for; memory and the names of nodes are left out."""
    hidden = ("node:", "memory", "object_store_memory")
    return [(name, amount) for name, amount in sorted(resources.items()) if not name.startswith(hidden)]


@main.command()
@click.option("--env", "environment", default="CartPole-v1", show_default=True, help="A Gymnasium environment.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Decides the whole run.")
@click.option("--workers", type=click.IntRange(min=1), help="Simulators to run at once.  [default: one per CPU]")
@click.option(
    "--generations", default=200, show_default=True, type=click.IntRange(min=1), help="Stop after so many updates."
)
@click.option(
    "--out",
    default=Path("demo-output"),
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory for the learning curve (PNG and JSON lines) and the result.",
)
@click.option("--no-progress", is_flag=True, help="Print plain lines instead of a live bar.")
def demo(environment: str, seed: int, workers: int | None, generations: int, out: Path, no_progress: bool) -> None:
    """Learn to act in a Gymnasium environment by evolution strategies.

    Exits with 1 when the environment has a published threshold and the run ends below it.
    """
    missing = [name for name in ("gymnasium", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(f"the demo needs {' and '.join(missing)}: pip install 'zray[demo]'")
    import gymnasium

    import zray
    from zray.demo import report, training
    from zray.demo.simulation import Simulator

    try:
        Simulator(environment)
    except (gymnasium.error.Error, TypeError) as error:
        raise click.BadParameter(str(error), param_hint="--env") from error
    curve = report.CurveWriter(out)
    zray.init()
    try:
        with report.display(generations, live=False if no_progress else None) as display:

            def on_generation(generation: training.Generation) -> None:
                display.show(generation)
                curve.add(generation)

            outcome = training.train(
                environment, seed=seed, simulators=workers, generations=generations, report=on_generation
            )
    finally:
        zray.shutdown()
    click.echo(report.describe_outcome(outcome))
    for path in curve.finish(outcome):
        click.echo(f"wrote {path}")
    if outcome.threshold is not None and not outcome.solved:
        raise SystemExit(1)


@main.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def microbenchmark(arguments: tuple[str, ...]) -> None:
    """Measure zray on this machine and print a table (takes the arguments of zray.microbenchmark)."""
    from zray.microbenchmark import main as measure

    raise SystemExit(measure(list(arguments)))


if __name__ == "__main__":
    main()
