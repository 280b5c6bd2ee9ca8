"""`zray-cluster`: arguments and exit codes.

Covers what is typed and what is printed. Does not cover doing any of it (`running`, `jobs`, `transfer`, `templates`). Results go to standard
output, the table of hosts and reports to standard error.

Exit status: 0 all is well; 1 some host failed, each is named; 2 the command or the file is wrong; 128 + number of a signal that interrupted.
`exec` and `submit` exit with the status of what they ran.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from zray.launcher import config, rows
from zray.launcher.yaml_text import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from zray.launcher.display import Board
    from zray.launcher.jobs import Programs
    from zray.launcher.running import Payload, Run
    from zray.launcher.transfer import Files

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
        found = {"hosts": shown, "strangers": run.strangers, "jobs": run.jobs, "cluster": run.tables, **run.totals}
        click.echo(json.dumps(found))
    else:
        from rich.console import Console

        Console().print(rows.table(board.rows.values(), rows.STATUS, {}))
        if run.tables:
            click.echo(rows.tables_line(run.tables))
        for node in run.strangers:
            click.echo(f"node {node['NodeID'][:8]} at {node.get('address')} is on no host of the file")
        for job in run.jobs:
            ended = "" if job["status"] is None else f" with status {job['status']}"
            click.echo(f"job {job['id']} on {job['host']}: {job['state']}{ended}")
    _finish(run, board, False)


def _programs(
    cluster: config.ClusterFile, hosts: Sequence[config.Host], work: Callable[[Programs], Coroutine[Any, Any, None]]
) -> Programs:
    """Do something with programs on hosts; exits when a host fails, or when it was interrupted."""
    from zray.launcher.jobs import Programs

    async def go() -> Programs:
        run = Programs(cluster, hosts, board)
        await work(run)
        return run

    with _board(hosts, ("ssh",), quiet=True) as board:
        return asyncio.run(go())


def _exit_as(run: Programs) -> None:
    """Exit as the programs did; when there are several hosts, name those where it was badly."""
    bad = {host: status for host, status in run.statuses.items() if status}
    if not bad:
        return
    if len(run.hosts) == 1:
        from zray.launcher.jobs import exit_code

        raise SystemExit(exit_code(next(iter(bad.values()))))
    for host, status in sorted(bad.items()):
        ended = f"signal {-status}" if status < 0 else f"status {status}"
        click.echo(f"{host}: ended with {ended}", err=True)
    raise SystemExit(1)


@main.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_file_option
@_on_option("head")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(file: str | None, on: tuple[str, ...], command: tuple[str, ...]) -> None:
    """Run a COMMAND on hosts, in the cluster's environment, and exit as it does.

    One word is a line for sh; several are a program and its arguments, taken as they are. `zray.init()` in it finds the cluster. It ends
    with this command; for what is to go on, use submit.
    """
    cluster = _load(file)
    hosts = _select(cluster, on)
    words = ["sh", "-c", command[0]] if len(command) == 1 else list(command)
    run = _programs(cluster, hosts, lambda programs: programs.execute(words))
    _finish(run, run.board, False)
    _exit_as(run)


def _one(cluster: config.ClusterFile, on: tuple[str, ...]) -> tuple[config.Host, ...]:
    hosts = _select(cluster, on)
    if len(hosts) != 1:
        raise _Wrong(f"this takes one host, not {len(hosts)}: --on NAME")
    return hosts


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_file_option
@_on_option("head")
@click.option("--working-dir", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Sent as a whole.")
@click.option("--detach", is_flag=True, help="Do not wait for its end.")
@click.argument("script", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def submit(
    file: str | None,
    on: tuple[str, ...],
    working_dir: Path | None,
    detach: bool,
    script: Path,
    arguments: tuple[str, ...],
) -> None:
    """Send a Python SCRIPT to the head, run it there, show its output and exit as it does.

    It goes on when this command is interrupted or loses its connection: `logs JOB` shows it, `cancel JOB` ends it.
    """
    import secrets

    from zray.launcher import jobs

    cluster = _load(file)
    hosts = _one(cluster, on)
    try:
        name, files = jobs.pack(script, working_dir)
    except (OSError, ValueError) as error:
        raise _Wrong(str(error)) from None
    job = {"id": f"{script.stem}-{secrets.token_hex(3)}", "command": [name, *arguments]}
    run = _programs(cluster, hosts, lambda programs: programs.submit(job, files))
    _finish(run, run.board, False)
    click.echo(f"job {job['id']}", err=True)
    if detach:
        click.echo(job["id"])
        return
    _follow(cluster, hosts, str(job["id"]), None, True)


def _follow(
    cluster: config.ClusterFile, hosts: tuple[config.Host, ...], job: str, lines: int | None, follow: bool
) -> None:
    run = _programs(cluster, hosts, lambda programs: programs.follow(job, lines, follow))
    if run.signal:
        click.echo(f"the job goes on: zray-cluster logs {job} shows it, zray-cluster cancel {job} ends it", err=True)
        raise SystemExit(128 + run.signal)
    _finish(run, run.board, False)
    if "killed" in run.states.values():
        raise click.ClickException(f"job {job} was killed")
    _exit_as(run)


@main.command()
@_file_option
@click.option("--on", multiple=True, metavar="HOSTS", help="As for exec.  [default: all; for a job: head]")
@click.option("--lines", "-n", type=click.IntRange(min=0), help="Only so many last lines of each.  [default: all]")
@click.option("--follow", is_flag=True, help="Go on with what comes.")
@click.argument("job", required=False)
def logs(file: str | None, on: tuple[str, ...], lines: int | None, follow: bool, job: str | None) -> None:
    """Show the output of a JOB, or else the logs of nodes and their workers."""
    cluster = _load(file)
    if job:
        _follow(cluster, _one(cluster, on or ("head",)), job, lines, follow)
        return
    run = _programs(cluster, _select(cluster, on), lambda programs: programs.logs(lines, follow))
    _finish(run, run.board, False)


@main.command()
@_file_option
@_on_option("head")
@click.argument("job")
def cancel(file: str | None, on: tuple[str, ...], job: str) -> None:
    """End a JOB that was submitted."""
    cluster = _load(file)
    hosts = _one(cluster, on)
    run = _programs(cluster, hosts, lambda programs: programs.cancel(job))
    _finish(run, run.board, False)
    click.echo(f"job {job}: {run.states[hosts[0].name]}")


@main.command()
@_file_option
@_on_option("head")
def attach(file: str | None, on: tuple[str, ...]) -> None:
    """Open a shell on the head (or another host), in the cluster's environment."""
    import os

    from zray.launcher.jobs import Attach

    cluster = _load(file)
    hosts = _one(cluster, on)

    async def go() -> Attach:
        run = Attach(cluster, hosts, board)
        await run.prepare()
        return run

    with _board(hosts, ("ssh",), quiet=True) as board:
        run = asyncio.run(go())
    _finish(run, board, False)
    os.execvp(run.command[0], run.command)


def _transfer(file: str | None, on: tuple[str, ...], files: Files) -> None:
    from zray.launcher.transfer import COLUMNS, Transfer

    cluster = _load(file)
    hosts = _select(cluster, on)

    async def go() -> Transfer:
        run = Transfer(cluster, hosts, board, files)
        await run.copy()
        return run

    with _board(hosts, COLUMNS) as board:
        run = asyncio.run(go())
    _finish(run, board, False)


_exclude_option = click.option("--exclude", multiple=True, metavar="PATTERN", help="As of rsync; may be repeated.")
_delete_option = click.option("--delete", is_flag=True, help="Delete at the target what the source does not have.")


@main.command("rsync-up")
@_file_option
@_on_option("all")
@_exclude_option
@_delete_option
@click.argument("source")
@click.argument("target")
def rsync_up(
    file: str | None, on: tuple[str, ...], exclude: tuple[str, ...], delete: bool, source: str, target: str
) -> None:
    """Copy a file or directory from here to hosts, by rsync (DIR/ means what is in it). TARGET is relative to the home there."""
    from zray.launcher.transfer import Files

    _transfer(file, on, Files(source, target, True, delete, exclude))


@main.command("rsync-down")
@_file_option
@_on_option("head")
@_exclude_option
@_delete_option
@click.argument("source")
@click.argument("target")
def rsync_down(
    file: str | None, on: tuple[str, ...], exclude: tuple[str, ...], delete: bool, source: str, target: str
) -> None:
    """Copy a file or directory from hosts to here, by rsync; from several hosts into TARGET/HOST."""
    from zray.launcher.transfer import Files

    _transfer(file, on, Files(source, target, False, delete, exclude))


@main.command()
@click.argument("kind", type=click.Choice(["slurm", "k8s"]))
@click.option("--out", type=click.Path(path_type=Path), help="File to write.  [default: standard output]")
def template(kind: str, out: Path | None) -> None:
    """Write a recipe for a cluster under Slurm (a batch script) or Kubernetes (manifests)."""
    from zray.launcher import templates

    text = templates.text(kind)
    if out is None:
        click.echo(text, nl=False)
    elif out.exists():
        raise _Wrong(f"{out} is there already")
    else:
        out.write_text(text, encoding="utf-8")
        click.echo(f"wrote {out}", err=True)


if __name__ == "__main__":
    main()
