"""`zray-cluster`: arguments and exit codes.

Covers what is typed and what is printed. Does not cover doing any of it (`running`, `jobs`, `transfer`, `templates`). Results go to standard
output, the table of hosts and reports to standard error.

Exit status: 0 all is well; 1 some host failed, each is named; 2 the command or the file is wrong; 128 + number of a signal that interrupted.
`exec` and `submit` exit with the status of what they ran.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, TypeVar

import click

from zray.launcher import config, rows
from zray.launcher.yaml_text import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zray.launcher.display import Board
    from zray.launcher.running import Payload, Run

F = TypeVar("F", bound="Callable[..., Any]")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Bring a zray cluster up on hosts that you can reach by ssh, use it, and bring it down.

    FILE is the cluster's file (docs/launcher.md); default: $ZRAY_CLUSTER_FILE, or zray-cluster.yaml here.
    """


def _file_argument(command: F) -> F:
    """FILE as an argument."""
    return click.argument("file", required=False, envvar="ZRAY_CLUSTER_FILE")(command)


def _file_option(command: F) -> F:
    """FILE as an option: for commands that have other arguments."""
    return click.option("-f", "--file", envvar="ZRAY_CLUSTER_FILE", help="The cluster's file.")(command)


def _on_option(default: str) -> Callable[[F], F]:
    return click.option(
        "--on",
        multiple=True,
        default=[default],
        show_default=True,
        metavar="HOSTS",
        help="head, all, or names (also ranges: node[01-04]); may be repeated.",
    )


def _json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print the rows as JSON on standard output.")(command)


class _Wrong(click.ClickException):
    """The file or the arguments are wrong."""

    exit_code = 2


def _load(file: str | None) -> config.ClusterFile:
    try:
        return config.load(config.find(file))
    except (ConfigError, FileNotFoundError) as error:
        raise _Wrong(str(error)) from None
    except ModuleNotFoundError as error:
        raise click.ClickException(f"zray-cluster needs {error.name}: pip install 'zray[cluster]'") from None


def _select(cluster: config.ClusterFile, names: Sequence[str]) -> tuple[config.Host, ...]:
    try:
        return config.select(cluster, names)
    except ValueError as error:
        raise _Wrong(str(error)) from None


def _payload(cluster: config.ClusterFile) -> Payload:
    from zray.launcher.running import Payload

    try:
        return Payload(cluster)
    except OSError as error:
        raise _Wrong(f"{error.filename}: {error.strerror}") from None


def _board(hosts: Sequence[config.Host], columns: tuple[str, ...], *, quiet: bool = False) -> Board:
    from zray.launcher.display import Board

    return Board([host.name for host in hosts], columns, quiet=quiet)


def _finish(run: Run, board: Board, as_json: bool) -> None:
    """Report failures and exit."""
    shown = list(board.rows.values())
    if as_json:
        click.echo(json.dumps([row.as_json() for row in shown]))
    report = rows.failures(shown)
    if report:
        click.echo(f"\n{sum(row.failed for row in shown)} of {len(shown)} hosts failed:\n{report}", err=True)
    if run.signal:
        raise SystemExit(128 + run.signal)
    if report:
        raise SystemExit(1)


@main.command()
@_file_argument
@_json_option
def up(file: str | None, as_json: bool) -> None:
    """Start the cluster: whatever of it does not run yet. Hosts whose node runs are left alone."""
    from zray.launcher.running import Up

    cluster = _load(file)
    payload = _payload(cluster)

    async def go() -> Up:
        run = Up(cluster, cluster.hosts, board, payload)
        await run.bring_up()
        return run

    with _board(cluster.hosts, rows.UP) as board:
        run = asyncio.run(go())
    if run.address and not run.signal:
        good = sum(not row.failed for row in board.rows.values())
        click.echo(f"{cluster.name}: {good} of {len(cluster.hosts)} nodes run, the head is {run.address}", err=True)
        click.echo("zray-cluster submit SCRIPT runs a program there, zray-cluster attach opens a shell", err=True)
    _finish(run, board, as_json)


@main.command()
@_file_argument
@click.option("--only", multiple=True, metavar="HOSTS", help="Only these; others go on.")
@click.option("--purge", is_flag=True, help="Remove what was installed, too.")
@_json_option
def down(file: str | None, only: tuple[str, ...], purge: bool, as_json: bool) -> None:
    """End the cluster and remove all that `up` has put on its hosts (with --purge also what it installed)."""
    from zray.launcher.running import Down

    cluster = _load(file)
    hosts = _select(cluster, only)

    async def go() -> Down:
        run = Down(cluster, hosts, board, purge=purge)
        await run.bring_down()
        return run

    with _board(hosts, rows.DOWN) as board:
        run = asyncio.run(go())
    _finish(run, board, as_json)


@main.command()
@_file_argument
@_json_option
def check(file: str | None, as_json: bool) -> None:
    """Look whether `up` would work: names, keys, ports, clocks, Python, versions. Starts and changes nothing."""
    from zray.launcher.running import Check

    cluster = _load(file)
    payload = _payload(cluster)

    async def go() -> Check:
        run = Check(cluster, cluster.hosts, board, payload)
        await run.check()
        return run

    with _board(cluster.hosts, rows.CHECK) as board:
        run = asyncio.run(go())
    _finish(run, board, as_json)


@main.command()
@_file_argument
@_json_option
def status(file: str | None, as_json: bool) -> None:
    """Show the nodes, what they have, and submitted jobs. Exits with 1 when a node is missing."""
    from zray.launcher.running import Status

    cluster = _load(file)

    async def go() -> Status:
        run = Status(cluster, cluster.hosts, board)
        await run.ask()
        return run

    with _board(cluster.hosts, rows.STATUS, quiet=True) as board:
        run = asyncio.run(go())
    if as_json:
        shown = [row.as_json() for row in board.rows.values()]
        click.echo(json.dumps({"hosts": shown, "strangers": run.strangers, "jobs": run.jobs, **run.totals}))
    else:
        from rich.console import Console

        Console().print(rows.table(board.rows.values(), rows.STATUS, {}))
        for node in run.strangers:
            click.echo(f"node {node['NodeID'][:8]} at {node.get('address')} is on no host of the file")
        for job in run.jobs:
            ended = "" if job["status"] is None else f" with status {job['status']}"
            click.echo(f"job {job['id']} on {job['host']}: {job['state']}{ended}")
    _finish(run, board, False)


if __name__ == "__main__":
    main()
