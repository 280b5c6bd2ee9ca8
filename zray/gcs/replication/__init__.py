"""The control store on several nodes: a chain of replicas whose membership a council of three decides.

Covers who serves in an epoch (`configuration`), deciding it (`council`), one replica of the chain (`chain`), one process's
part in both and its suspicions (`member`), callers that find their way (`client`), the words of all of them (`messages`),
and the rows that are replicated (`state`). Does not cover sockets or processes: everything here is pure, and is told the
time and what has come. `docs/control-store.md` says what survives what.

Sources: van Renesse and Schneider, Chain Replication for Supporting High Throughput and Availability (OSDI 2004); Lamport,
Paxos Made Simple (2001), one instance an epoch; Gray and Cheriton, Leases (SOSP 1989).
"""

from __future__ import annotations
