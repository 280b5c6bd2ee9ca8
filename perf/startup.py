"""How long a system takes to be there and to be gone: import, init, first task, shutdown, each in a fresh process.

Covers the four stretches as a user's script sees them. Does not cover starting Python itself (floor "interpreter").
The measured process runs nothing but the few lines below: importing this package there would warm up modules that the
measured import has to pay for.

`python -m perf.startup [--api NAME] [--runs N]` prints medians; `--once` measures one process and prints a JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable

from . import timing
from .sides import CPUS, ROOT, environment, ray_options

PHASES = ("import", "init", "first task", "shutdown")

SCRIPT = """
import json, sys, time
name, options = sys.argv[1], json.loads(sys.argv[2])
taken = []
start = time.perf_counter()
api = __import__(name)
taken.append(time.perf_counter() - start)
start = time.perf_counter()
api.init(**options)
taken.append(time.perf_counter() - start)
@api.remote
def small_value():
    return b"ok"
start = time.perf_counter()
answer = api.get(small_value.remote())
taken.append(time.perf_counter() - start)
assert answer == b"ok", answer
start = time.perf_counter()
api.shutdown()
taken.append(time.perf_counter() - start)
print("\\n" + json.dumps(taken))
"""


def options_of(api: str) -> dict[str, object]:
    """Return the keyword arguments that a system's `init` gets here."""
    return ray_options() if api == "ray" else {"num_cpus": CPUS}


def run_once(api: str, python: str = sys.executable, *, patience: float = 120.0) -> dict[str, float]:
    """Return the seconds of each phase in one fresh process. RuntimeError with its last words if it fails."""
    done = subprocess.run(
        [python, "-c", SCRIPT, api, json.dumps(options_of(api))],
        capture_output=True,
        text=True,
        timeout=patience,
        check=False,
        cwd=ROOT,
        env=environment(),
    )
    if done.returncode:
        raise RuntimeError(f"start-up of {api} failed ({done.returncode}): {done.stderr[-4000:]}")
    taken: list[float] = json.loads(done.stdout.strip().splitlines()[-1])
    return dict(zip(PHASES, taken, strict=True))


def medians(runs: Iterable[dict[str, float]]) -> dict[str, timing.Summary]:
    """Put several runs in short, phase by phase (seconds)."""
    kept = list(runs)
    return {phase: timing.summarize(run[phase] for run in kept) for phase in PHASES}


def main(arguments: list[str] | None = None) -> int:
    """Measure start-up from the command line."""
    parser = argparse.ArgumentParser(prog="python -m perf.startup", description=__doc__.split("\n")[0])
    parser.add_argument("--api", default="zray")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--once", action="store_true", help="one process; print a JSON line")
    chosen = parser.parse_args(arguments)
    if chosen.once:
        timing.print_json(run_once(chosen.api))
        return 0
    found = medians(run_once(chosen.api) for _ in range(chosen.runs))
    print(f"{chosen.api}, median of {chosen.runs} fresh processes")
    for phase, summary in found.items():
        low, median, high = (1e3 * value for value in (summary.low, summary.median, summary.high))
        print(f"{phase:12s} {median:9.1f} ms   quartiles {low:.1f} .. {high:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
