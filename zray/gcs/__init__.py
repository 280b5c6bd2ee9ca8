"""The control store: the cluster's memory, a sharded key-value service with numbered change notices.

Covers which rows exist (`tables`), which shard keeps them (`sharding`), one shard (`shard`, `task_rows`), how
subscribers notice what they missed (`topics`), the words spoken with it (`messages`), where acknowledged writes go
(`storage`), the running service (`service`, with its parts `requests`, `task_history` and `notices`) and its callers
(`client`). Does not cover who decides anything: brokers and schedulers do, and can be restarted from these rows.

Everything but the service, `client` and the storages is pure: no sockets, clocks, threads or files. Rows are the truth; a
notice is a hint.
"""

from __future__ import annotations
