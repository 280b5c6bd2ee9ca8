"""What a person sees of a run: a live progress bar or plain lines, the learning curve as JSON lines and as a picture.

Covers the only output of the demo, to the terminal and to files. Does not cover when a generation ends or what its
numbers are (`training`). rich and matplotlib are imported where they are used, because neither is needed to train.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

from zray.demo.training import Generation, Outcome

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

CURVE_ROWS = "learning_curve.jsonl"
CURVE_PICTURE = "learning_curve.png"
RESULT = "result.json"


class Display(Protocol):
    """Shows one generation as it ends."""

    def show(self, generation: Generation) -> None:
        """Show `generation`; called once for each, in order."""


class PlainDisplay:
    """One line a generation: for pipes, logs and `--no-progress`."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def show(self, generation: Generation) -> None:
        """Write one line."""
        evaluated = "" if generation.evaluation is None else f"  evaluated {generation.evaluation:.1f}"
        print(describe_generation(generation) + evaluated, file=self._out, flush=True)


class BarDisplay:
    """A live bar on a terminal."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def show(self, generation: Generation) -> None:
        """Move the bar and replace its figures."""
        self._progress.update(self._task, completed=generation.generation, figures=describe_generation(generation))


def describe_generation(generation: Generation) -> str:
    """Return the figures of one generation, short enough for a bar beside them; rates are means since the start."""
    seconds = max(generation.seconds, 1e-9)
    return (
        f"gen {generation.generation:3d}  mean {generation.mean:6.1f}  best {generation.best:6.1f}"
        f" {generation.episodes / seconds:5.0f} episodes/s {generation.tasks / seconds:5.0f} tasks/s"
    )


def describe_outcome(outcome: Outcome) -> str:
    """Return the last line of a run: what was reached, against which bar, with what effort."""
    if outcome.threshold is None:
        verdict = "trained (no published threshold)"
    else:
        verdict = f"{'solved' if outcome.solved else 'NOT solved'} (threshold {outcome.threshold:g})"
    return (
        f"{outcome.environment} {verdict}: mean return {outcome.evaluation:.1f} over fresh episodes after "
        f"{outcome.generations} generations, {outcome.episodes} episodes, {outcome.seconds:.1f} s "
        f"with {outcome.simulators} simulators (seed {outcome.seed})"
    )


@contextmanager
def display(generations: int, *, live: bool | None = None) -> Iterator[Display]:
    """Yield a display for at most `generations` generations; `live=None` asks whether standard error is a terminal."""
    if not (sys.stderr.isatty() if live is None else live):
        yield PlainDisplay(sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    columns = (SpinnerColumn(), BarColumn(bar_width=10), TextColumn("{task.fields[figures]}"))
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield BarDisplay(progress, progress.add_task("", total=generations, figures="starting"))


class CurveWriter:
    """Keeps the learning curve: a JSON line as each generation ends, a picture and the result at the end."""

    def __init__(self, directory: Path) -> None:
        """Make `directory` where it is missing and begin a new curve in it; raises OSError when that cannot be done."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._rows: list[Generation] = []
        (directory / CURVE_ROWS).write_text("")

    def add(self, generation: Generation) -> None:
        """Append one row at once, so that a run that is broken off leaves its curve."""
        self._rows.append(generation)
        with (self._directory / CURVE_ROWS).open("a") as rows:
            rows.write(json.dumps(asdict(generation)) + "\n")

    def finish(self, outcome: Outcome) -> list[Path]:
        """Write the result and the picture; return the paths of all files."""
        result = {**asdict(outcome), "policy": outcome.policy.tolist(), "solved": outcome.solved}
        (self._directory / RESULT).write_text(json.dumps(result, indent=2) + "\n")
        self._draw(outcome)
        return [self._directory / name for name in (CURVE_ROWS, CURVE_PICTURE, RESULT)]

    def _draw(self, outcome: Outcome) -> None:
        # A Figure of one's own needs neither pyplot's global state nor a display.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        numbers = [row.generation for row in self._rows]
        axes.plot(numbers, [row.best for row in self._rows], color="tab:gray", label="best episode so far")
        axes.plot(numbers, [row.mean for row in self._rows], color="tab:blue", label="mean of a generation")
        evaluated = [(row.generation, row.evaluation) for row in self._rows if row.evaluation is not None]
        axes.plot(*zip(*evaluated, strict=True), "o", color="tab:orange", label="mean of fresh episodes")
        if outcome.threshold is not None:
            axes.axhline(outcome.threshold, color="tab:green", linestyle="--", label="solved")
        axes.set(xlabel="generation", ylabel="return", title=f"{outcome.environment}, seed {outcome.seed}")
        axes.legend(loc="best")
        figure.savefig(self._directory / CURVE_PICTURE, dpi=120)
