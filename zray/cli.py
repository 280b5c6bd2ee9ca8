"""The command line: `zray demo`, `zray microbenchmark`, `zray version`.

Covers arguments and exit codes only; each command imports what it runs when it is run, so that `zray --help` stays
quick. Neighbours: `zray.demo`, `zray.microbenchmark`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import click


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
