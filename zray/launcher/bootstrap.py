"""How the launcher's program gets onto a host and into memory there. Pure: texts in, texts out.

The remote command is one fixed line, which every login shell (sh, bash, zsh, csh, tcsh, fish) reads in the same way: it starts `sh` and has
it read a script of known length from standard input. So nothing has to be quoted for shells that one does not know, and nothing, the
cluster's key least of all, stands in a command line for others to read. `dd` reads byte by byte: what follows the script stays for the next.
The script looks for a Python and starts it with the program, read from standard input in the same way.
"""

from __future__ import annotations

import json
import shlex
from importlib import resources
from typing import Final

PYTHONS: Final = ("python3", "python3.13", "python3.12", "python3.11", "python3.10", "python")
"""Tried in this order where the file names none."""
NO_PYTHON: Final = "no_python"
"""Field of the message that there is none that would do: what was found."""
_MODULES: Final = ("channel", "watched", "place", "node_life", "looks", "install", "jobs", "main")
"""Each imports earlier ones only."""

# The package's name on the host is not zray's: zray may be there as well.
_LOADER: Final = """\
import json, sys, types
package = types.ModuleType("zray_agent")
package.__path__ = []
sys.modules["zray_agent"] = package
for name, text in json.loads({sources!r}):
    module = types.ModuleType("zray_agent." + name)
    module.__package__ = "zray_agent"
    sys.modules[module.__name__] = module
    setattr(package, name, module)
    exec(compile(text, "zray_agent/" + name + ".py", "exec"), module.__dict__)
sys.modules["zray_agent.main"].main({token!r})
"""

_READ_PROGRAM: Final = """\
import os, sys
left, parts = {size}, []
while left:
    part = os.read(0, left)
    if not part:
        sys.exit(1)
    parts.append(part)
    left -= len(part)
exec(compile(b"".join(parts), "zray-cluster", "exec"))
"""

_PROBE: Final = "import sys; print('%d.%d.%d' % sys.version_info[:3]); sys.exit(3 * (sys.version_info < (3, 10)))"
"""Exits with 3 where Python is too old; whatever else fails is no Python at all."""
_SCRIPT: Final = """\
found=
for p in {candidates}; do
  case $p in "~/"*) p=$HOME/${{p#??}};; esac
  v=$("$p" -I -c {probe} 2>/dev/null </dev/null)
  case $? in
    0) exec "$p" -I -u -c {reader};;
    3) found="$found $p is $v;";;
  esac
done
printf '\\n%s {{"{no_python}": "%s"}}\\n' {token} "$found"
"""


def program(token: str) -> bytes:
    """Return the launcher's program for hosts as one text of Python; `token` as in `zray.launcher.remote.channel`."""
    place = resources.files("zray.launcher.remote")
    sources = [(name, (place / f"{name}.py").read_text(encoding="utf-8")) for name in _MODULES]
    return _LOADER.format(sources=json.dumps(sources), token=token).encode()


def introduction(token: str, python: str) -> tuple[str, bytes]:
    """Return the remote command, and what is to be written to its standard input first.

    Args:
        token: letters and digits.
        python: as configured; empty: look for one.
    """
    text = program(token)
    script = _SCRIPT.format(
        candidates=" ".join(map(shlex.quote, [python] if python else PYTHONS)),
        probe=shlex.quote(_PROBE),
        reader=shlex.quote(_READ_PROGRAM.format(size=len(text))),
        no_python=NO_PYTHON,
        token=token,
    ).encode()
    return f"sh -c 'eval \"$(dd bs=1 count={len(script)} 2>/dev/null)\"'", script + text
