"""Every program in examples/ runs alone, in a process where warnings are errors, and says what it checked."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

EXPECTED = {
    "nested_search": "four experiments, 192 nested tasks: all four minima found",
    "parameter_server": "four endless workers on two CPUs fitted curve = 0.50, slope = -2.00, offset = 3.00",
    "read_array_add": "sum of 1000000 pairs: every element is 999999",
    "simulator_actor": "4 steps of CartPole-v1 in an actor: the same observations",
    "word_count": "declaration_of_independence.txt: 1335 words, 536 different",
}


def run_example(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run one example from a directory that is not the project's."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, stdin=subprocess.DEVNULL, cwd=cwd)


def test_every_example_is_expected_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_example_says_what_it_checked(name: str, tmp_path: Path) -> None:
    if name == "simulator_actor":
        pytest.importorskip("gymnasium", reason="gymnasium is not installed (extra: demo)")
    done = run_example(name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert EXPECTED[name] in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_word_count_reads_the_file_it_is_given(tmp_path: Path) -> None:
    paragraphs = [" ".join(["to be, or not to be"] * repeats) for repeats in range(1, 8)]
    file = tmp_path / "speech.txt"
    file.write_text("\n\n".join(paragraphs))
    done = run_example("word_count", str(file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    total = 6 * sum(range(1, 8))
    lines = done.stdout.splitlines()
    assert lines[0] == f"speech.txt: {total} words, 4 different"
    counted = Counter({line.split()[1]: int(line.split()[0]) for line in lines[1:]})
    assert counted == {"to": total // 3, "be": total // 3, "or": total // 6, "not": total // 6}


def test_the_text_is_whole_and_small() -> None:
    text = (EXAMPLES / "texts" / "declaration_of_independence.txt").read_text(encoding="utf-8")
    assert text.startswith("In Congress, July 4, 1776.")
    assert text.rstrip().endswith("our sacred Honor.")
    assert len(text) < 60_000
