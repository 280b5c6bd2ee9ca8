"""The broker of one node: pure machines that decide, and the server that obeys them.

`scheduler.Scheduler` is the door to the machines: `handle(event, now) -> actions`. Events are in `events`, actions in
`actions`.
"""

from __future__ import annotations
