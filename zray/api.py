"""init, shutdown, put, get, wait, cancel, kill ...: each a few lines over a Session.

This module alone holds a current session, for convenience; nothing below it looks. Public names are re-exported by `zray/__init__.py`.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast, overload

import msgspec

from zray import _store, errors, ids, signatures, wire
from zray import node as nodes_
from zray.futures import ResultWatcher
from zray.log_tail import LogTail
from zray.object_store import ObjectRef, Store
from zray.session import RUNNING, Session, SessionConfig
from zray.submission import Submitter
from zray.task import ActorSpec, JobSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from zray.building import UnsealedArray
    from zray.runtime_context import RuntimeContext
    from zray.signatures import NamedHandle

T = TypeVar("T")

_lock = threading.RLock()
_session: Session | None = None
_submitter: Submitter | None = None
_watcher: ResultWatcher | None = None
_node: nodes_.Node | nodes_.RunningNode | None = None
_tail: LogTail | None = None
_actor_spec: ActorSpec | None = None


def current_session() -> Session:
    """The running session; one with default settings is started when there is none (Ray programs rely on it)."""
    session = _session
    if session is None or session.closed:
        init()
        session = _session
        assert session is not None
    return session


def submitter_of(session: Session) -> Submitter:
    """The submitter of the current session."""
    assert _submitter is not None
    assert _submitter.session is session
    return _submitter


def attach(session: Session, submitter: Submitter) -> None:
    """Make a session the current one of this process (drivers and workers, once it is whole)."""
    global _session, _submitter, _watcher
    _session, _submitter = session, submitter
    _watcher = ResultWatcher(session)
    _store.hooks.current_store = session.store
    _store.hooks.future = _watcher.future
    _store.hooks.awaiting = _watcher.awaiting
    _store.hooks.load_file = session.objects.load_file


def set_actor(spec: ActorSpec) -> None:
    """This process became an actor."""
    global _actor_spec
    _actor_spec = spec


def own_actor_spec() -> ActorSpec | None:
    """The spec of the actor this process is, if it is one."""
    return _actor_spec


def own_handle(session: Session) -> Any:
    """A handle of the actor this process is. Raises RuntimeError when it is none."""
    from zray.actor import ActorHandle

    spec = _actor_spec
    if spec is None:
        raise RuntimeError("this code does not run inside an actor")
    life = session.store.reference(spec.creation.id)
    if life is None:
        raise errors.ActorDiedError(actor_id=spec.creation.id.hex())
    return ActorHandle(spec.creation.id, life, spec.class_name, spec.methods, spec.max_pending_calls)


# -- session ---------------------------------------------------------------------------------------------------------


class SessionContext:
    """What `init` returns: facts of the session, and a context manager that shuts it down."""

    def __init__(self, info: dict[str, Any]) -> None:
        self.address_info = info
        self.dashboard_url = ""

    def __enter__(self) -> SessionContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutdown()

    def disconnect(self) -> None:
        """The same as `zray.shutdown()`."""
        shutdown()

    def __getitem__(self, name: str) -> Any:
        return self.address_info[name]

    def __repr__(self) -> str:
        return f"SessionContext({self.address_info})"


def init(
    address: str | None = None,
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    memory: int | None = None,
    resources: dict[str, float] | None = None,
    object_store_memory: int | None = None,
    namespace: str | None = None,
    labels: dict[str, str] | None = None,
    log_to_driver: bool = True,
    ignore_reinit_error: bool = False,
    preload: Sequence[str] | None = None,
    cluster_key: str | None = None,
    own_scheduler: bool = False,
    **compatible: Any,
) -> SessionContext:
    """Start a session on this machine and connect to it, or connect to a cluster that runs.

    Args:
        address: "local": a new session of this process's own. "auto": the cluster that a node of this user on this machine
            belongs to (the newest, if there are several). host:port: the cluster with that head; from a machine without a
            node of it (host:port may be a tunnel's end there), the cluster's key is needed. None: what the environment
            variable ZRAY_ADDRESS says, else "local". What a session has (num_cpus ...) can be said of new ones only.
        num_cpus: CPUs that tasks may occupy; default: what affinity and control group leave this process.
        num_gpus: GPUs; default: those CUDA_VISIBLE_DEVICES names or the driver lists.
        memory: bytes of memory that tasks may ask for with `memory=`.
        resources: custom resources, name to amount.
        object_store_memory: bytes of the object store; default 30 % of this machine's (or control group's) memory. Taken only as used.
        namespace: where names of actors are valid; default: one of this session's own.
        labels: labels of the node.
        log_to_driver: print what tasks print.
        ignore_reinit_error: do nothing when a session runs already.
        preload: modules that all workers have imported before they start (default: numpy).
        cluster_key: a copy of the key file of the cluster's head, for connecting from outside; default: what the environment
            variable ZRAY_CLUSTER_KEY names. Not used where a node of the cluster runs.
        own_scheduler: with the address of a cluster: start a scheduler beside this process, which queues and places the tasks of this job alone, and ends
            with it. One that submits hundreds of thousands of tasks then keeps no other waiting in the queues of a node's broker. What this
            process puts and gets is in a store of its own (`object_store_memory`). Programs from outside the cluster have one anyway.
        compatible: settings of Ray that have no effect here (include_dashboard, logging_level, _system_config ...).

    Returns:
        A context with facts of the session; used in a `with` statement it shuts the session down.

    Raises:
        ZrayUsageError: a session runs already; or no node of that cluster runs on this machine, and there is no key.
        ValueError, TypeError: bad arguments; the file named as key holds none, or others may read it.
        OSError: that file cannot be read.
        ZraySystemError: the node cannot be started, or the cluster cannot be reached or does not take the key.
    """
    global _node, _tail
    with _lock:
        if _session is not None and not _session.closed:
            if ignore_reinit_error or _session.worker:
                return SessionContext(_facts(_session))
            raise errors.ZrayUsageError(
                "zray.init() was called twice. Call zray.shutdown() first, or pass ignore_reinit_error=True to go on with the running session"
            )
        _check_init(num_cpus, num_gpus, memory, resources, object_store_memory, compatible)
        address = os.environ.get("ZRAY_ADDRESS") or "local" if address is None else address
        if own_scheduler and address == "local":
            raise ValueError(
                "zray.init(own_scheduler=True) is for programs that connect to a cluster: give its address. A session of one's own is not shared"
            )
        if address != "local":
            given = {
                "num_cpus": num_cpus,
                "num_gpus": num_gpus,
                "memory": memory,
                "resources": resources,
                "labels": labels,
                "preload": preload,
            }
            _check_joining(address, [name for name, value in given.items() if value is not None])
        settings = nodes_.NodeSettings(
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            memory=memory,
            resources=dict(resources or {}),
            object_store_memory=object_store_memory,
            labels=dict(labels or {}),
            preload=None if preload is None else list(preload),
            log_to_driver=log_to_driver,
        )
        started: nodes_.Node | nodes_.RunningNode | None = None
        try:
            if address == "local":
                started = nodes_.start(settings, os.getpid())
            else:
                key_file = cluster_key or os.environ.get("ZRAY_CLUSTER_KEY", "")
                started = _find_node(address, settings, key_file, own_scheduler)
            session = _connect(started, namespace, log_to_driver)
            _node = started
            submitter = Submitter(session)
            attach(session, submitter)
            submitter.start_flusher()
            if log_to_driver:
                _tail = LogTail(os.path.join(started.directory, "logs"), session.job)
                session.after_get = _tail.drain
            atexit.register(_shutdown_at_exit)
        except BaseException:
            shutdown()
            if started is not None:
                started.stop()
            raise
        return SessionContext(_facts(session))


_COMPATIBLE = frozenset(
    [
        "include_dashboard",
        "dashboard_host",
        "dashboard_port",
        "logging_level",
        "logging_format",
        "logging_config",
        "log_to_driver",
        "configure_logging",
        "_system_config",
        "_temp_dir",
        "_memory",
        "_redis_password",
        "_node_ip_address",
        "_driver_object_store_memory",
        "_enable_object_reconstruction",
        "_plasma_directory",
        "job_config",
        "runtime_env",
        "local_mode",
        "_metrics_export_port",
        "_tracing_startup_hook",
        "_node_name",
    ]
)


def _check_joining(address: str, given: list[str]) -> None:
    if not isinstance(address, str) or (address != "auto" and not nodes_.is_address(address)):
        raise ValueError(f'zray.init(): address must be "local", "auto" or host:port, not {address!r}')
    if given:
        raise ValueError(
            f"zray.init(address={address!r}): {', '.join(given)} cannot be chosen for nodes that run already; give them to `zray start`"
        )


def _find_node(
    address: str, settings: nodes_.NodeSettings, key_file: str, own_scheduler: bool
) -> nodes_.Node | nodes_.RunningNode:
    """Return this user's node on this machine that belongs to a cluster, or one that connects this process alone."""
    running = nodes_.running_nodes()
    found = running[0] if address == "auto" and running else None
    for place in ("address", "head"):
        for node in running:
            if found is None and getattr(node.record, place) == address:
                found = node
    if found is not None and own_scheduler:
        return nodes_.start_job_scheduler(settings, os.getpid(), found.record)
    if found is not None:
        if settings.object_store_memory is not None:
            _check_joining(address, ["object_store_memory"])
        return found
    if address != "auto" and key_file:
        return nodes_.start_gateway(settings, os.getpid(), address, key_file)
    if address == "auto":
        raise errors.ZrayUsageError(
            "zray.init(address='auto'): no node of a cluster runs here. Start one with `zray start --head`, or leave the address out"
        )
    others = ", ".join(sorted({node.record.head for node in running}))
    raise errors.ZrayUsageError(
        f"zray.init(address={address!r}): no node of that cluster runs on this machine{f' (there are nodes of {others})' if others else ''}. "
        f"Start one with `zray start --address {address} --key FILE`, or connect from outside with a copy of the head's key file: "
        f"zray.init(address={address!r}, cluster_key=FILE), or ZRAY_CLUSTER_KEY=FILE"
    )


def _check_init(
    num_cpus: float | None,
    num_gpus: float | None,
    memory: int | None,
    resources: dict[str, float] | None,
    store: int | None,
    compatible: dict[str, Any],
) -> None:
    for name in compatible:
        if name not in _COMPATIBLE:
            raise TypeError(f"zray.init() has no argument {name!r}")
    for name, amount in {"num_cpus": num_cpus, "num_gpus": num_gpus, "memory": memory, **(resources or {})}.items():
        if amount is not None and (isinstance(amount, bool) or not isinstance(amount, (int, float)) or amount < 0):
            raise ValueError(f"zray.init(): {name} must be a number that is not negative, not {amount!r}")
    if store is not None and store < 1 << 20:
        raise ValueError(f"zray.init(): object_store_memory must be at least 1 MiB ({1 << 20}), not {store}")
    for name in ("CPU", "GPU", "memory", "object_store_memory"):
        if resources and name in resources:
            raise ValueError(f"zray.init(): set {name} with its own argument, not in resources")


def _directory() -> str:
    """Return the current directory. Empty when it was deleted: nothing can be imported from it, and workers have none then, as this process."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def _connect(started: nodes_.Node | nodes_.RunningNode, namespace: str | None, log_to_driver: bool) -> Session:
    store = Store(started.open_store())
    store.register(_store.PROC_DRIVER)
    job_id = ids.random_id()
    node = b"\0" * 16
    config = SessionConfig(
        started.directory, started.spill_directory, node, 0, job_id, namespace or job_id.hex(), log_to_driver
    )
    session = Session(config, store)
    try:
        here = _directory()
        paths = [found for path in sys.path if (found := path or here)]
        job = JobSpec(0, job_id, os.getpid(), config.namespace, paths, here)
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        answer = session.request(lambda reply: wire.Hello(store.process, job, reply, _version(), version), timeout=30.0)
        admitted = msgspec.msgpack.decode(answer, type=wire.HelloReply)
    except BaseException:
        session.close()
        raise
    session.config = msgspec.structs.replace(config, job=admitted.job, node=admitted.node)
    session.job = admitted.job
    store.set_job(admitted.job)
    return session


def _version() -> str:
    from zray import __version__

    return __version__


def _facts(session: Session) -> dict[str, Any]:
    address, own = ("", "") if _node is None else (_node.record.head, _node.record.address)
    return {
        "address": address or session.config.directory,
        "session_dir": session.config.directory,
        "node_id": session.config.node.hex(),
        "node_ip_address": own.rpartition(":")[0].strip("[]") or "127.0.0.1",
        "object_store_address": session.config.directory,
        "gcs_address": address or session.config.directory,
        "webui_url": "",
    }


def shutdown(_exiting_interpreter: bool = False) -> None:
    """End the session that this process started: tasks and actors of it, its node, its files. Does nothing when there is none."""
    global _session, _submitter, _watcher, _node, _tail
    with _lock:
        session, submitter, started = _session, _submitter, _node
        if session is None or session.worker:
            return
        atexit.unregister(_shutdown_at_exit)
        if _watcher is not None:
            _watcher.stop()  # before the broker ends the tasks: open futures are cancelled, they do not fail
        if not session.closed and submitter is not None:
            try:
                submitter.stop()
                if started is not None:  # a child that was forked leaves alone; the job is its parent's
                    session.tell(wire.Goodbye(session.store.process, session.job))
            except errors.ZrayError:
                pass
        if _tail is not None:
            _tail.stop()
        hooks = _store.hooks
        hooks.current_store = None
        hooks.future = hooks.awaiting = hooks.load_file = (
            _ended  # or they would keep the session, and with it the mapping
        )
        session.close()
        if started is not None:
            started.stop()
        _session = _submitter = _watcher = _node = _tail = None


def _shutdown_at_exit() -> None:
    _store.hooks.exiting = True
    shutdown()


def _ended(*_: object) -> NoReturn:
    raise errors.ZrayUsageError("the zray session was shut down: call zray.init() first")


def is_initialized() -> bool:
    """Whether a session runs in this process."""
    return _session is not None and not _session.closed


# -- objects ---------------------------------------------------------------------------------------------------------


def put(value: T) -> ObjectRef[T]:
    """Store a value and return a reference to it.

    Raises:
        TypeError: the value is a reference already, or cannot be pickled (SerializationError names the part).
        ObjectStoreFullError, OutOfDiskError: there is no room, not even on disk.
    """
    if type(value) is ObjectRef:
        raise TypeError(
            "zray.put() of a reference is not allowed: pass the reference itself, or put a list that holds it"
        )
    return current_session().put(value)


def create(shape: int | tuple[int, ...], dtype: Any = "float64") -> UnsealedArray:
    """Make an array inside the object store, to be filled and then sealed without any copy.

    Args:
        shape: as numpy's.
        dtype: as numpy's; no object types.

    Returns:
        An `UnsealedArray`: `.array` is a writable numpy array in shared memory, `.seal()` makes it an object and returns its reference.

    Raises:
        ObjectStoreFullError, OutOfDiskError: there is no room.
    """
    from zray.building import UnsealedArray

    return UnsealedArray(current_session(), shape, dtype)


@overload
def get(refs: ObjectRef[T], *, timeout: float | None = None, writable: bool = False) -> T: ...
@overload
def get(refs: list[ObjectRef[T]] | tuple[ObjectRef[T], ...], *, timeout: float | None = None) -> list[T]: ...
def get(refs: Any, *, timeout: float | None = None, writable: bool = False) -> Any:
    """Return the value of a reference, or the list of values of a list of references; waits for them.

    Arrays are read-only views of shared memory; the memory stays as long as they live.

    Args:
        refs: a reference, or a list or tuple of references.
        timeout: seconds to wait; None: as long as it takes.
        writable: for one reference: arrays lie in private copy-on-write memory instead.

    Raises:
        TaskError (also an instance of the exception the task raised), WorkerCrashedError, ActorDiedError, ObjectLostError ...: the object is an error.
        GetTimeoutError: the time is over.
        TypeError, ValueError: not a reference.
    """
    session = _session
    if session is None or session.closed:
        session = current_session()
    kind = type(refs)
    if kind is ObjectRef:
        if writable:
            return session.get_writable(refs, timeout)
        return session.get([refs], timeout)[0]
    if kind is list or kind is tuple:
        refs = list(refs)  # another thread may change the caller's
        wrong = _store.all_refs(refs)
        if wrong >= 0:
            raise ValueError(
                f"zray.get() takes references, but item {wrong} of the list is {_described(refs[wrong])}. "
                "Pass what .remote() or zray.put() returned"
            )
        if timeout is not None and timeout < 0:
            raise ValueError(f"the timeout of zray.get() must not be negative: {timeout}")
        return session.get(refs, timeout) if refs else []
    raise ValueError(
        f"zray.get() takes a reference or a list of references, not {_described(refs)}. Pass what .remote() or zray.put() returned"
    )


def _described(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


def wait(
    refs: Sequence[ObjectRef[T]], *, num_returns: int = 1, timeout: float | None = None, fetch_local: bool = True
) -> tuple[list[ObjectRef[T]], list[ObjectRef[T]]]:
    """Wait until some of many results are there.

    Args:
        refs: different references.
        num_returns: how many to wait for; at most so many are returned as ready.
        timeout: seconds; None: as long as it takes.
        fetch_local: bring values that are on other nodes of the cluster before they count as ready; else they count where they are.

    Returns:
        (ready, not ready), both in the order of `refs`.

    Raises:
        TypeError, ValueError: not references, duplicates, or a bad number.
    """
    if cast("object", type(refs)) is ObjectRef:
        raise TypeError("zray.wait() takes a list of references, not one reference; put it into a list")
    items = list(refs)  # another thread may change the caller's
    wrong = _store.all_refs(items)
    if wrong >= 0:
        raise TypeError(f"zray.wait() takes references, but item {wrong} of the list is {_described(items[wrong])}")
    if num_returns <= 0:
        raise ValueError(f"num_returns of zray.wait() must be at least 1, not {num_returns}")
    if num_returns > len(items):
        if not items:
            return [], []
        raise ValueError(f"num_returns of zray.wait() is {num_returns}, but there are only {len(items)} references")
    if timeout is not None and timeout < 0:
        raise ValueError(f"the timeout of zray.wait() must not be negative: {timeout}")
    if _store.has_duplicates(items):
        raise ValueError("zray.wait() got a reference more than once; the references must differ")
    return current_session().wait(items, num_returns, timeout, fetch_local)


def cancel(ref: ObjectRef, *, force: bool = False, recursive: bool = True) -> None:
    """Cancel a task: remove it from the queue, or interrupt it (KeyboardInterrupt inside); its reference then raises TaskCancelledError.

    Args:
        ref: a result of the task.
        force: end the worker process that runs it. Calls of actors are interrupted at most: the actor lives on.
        recursive: cancel the tasks it started, too.

    A running call of an actor with max_concurrency > 1 that is not asynchronous cannot be interrupted.

    Raises:
        TypeError: not a reference to a task's result.
    """
    if type(ref) is not ObjectRef:
        raise TypeError(f"zray.cancel() takes a reference, not {_described(ref)}")
    if ids.is_put(ref.binary()):
        raise TypeError("zray.cancel() takes the reference of a task's result: nothing runs to make what was put")
    session = current_session()
    if not session.store.done(ref):
        submitter_of(session).hand_over_lanes()
        session.tell(wire.CancelTask(ref.task_id(), force, recursive))


def kill(actor: Any, *, no_restart: bool = True) -> None:
    """End an actor at once.

    Args:
        actor: its handle.
        no_restart: False lets it restart if max_restarts allows.

    Raises:
        ValueError: not a handle of an actor.
        ZrayUsageError: a handle of a session that has ended.
    """
    from zray.actor import ActorHandle

    if not isinstance(actor, ActorHandle):
        raise ValueError(f"zray.kill() takes an actor handle, not {_described(actor)}. To end a task use zray.cancel()")
    session = current_session()
    session.store.done(actor._zray_life)  # refuses what another session made
    submitter_of(session).link(actor._zray_actor_id).kill(no_restart)


def get_actor(name: str, namespace: str | None = None) -> NamedHandle:
    """Return a handle of the actor with this name.

    Raises:
        ValueError: no such actor in the namespace (default: this program's).
    """
    from zray.actor import ActorHandle

    if not isinstance(name, str) or not name:
        raise ValueError("zray.get_actor() needs the name of an actor")
    session = current_session()
    space = namespace or session.config.namespace
    spec = msgspec.msgpack.decode(session.request(lambda reply: wire.LookupActor(name, space, reply)), type=ActorSpec)
    life = session.store.reference(spec.creation.id)
    if life is None:
        raise ValueError(f"Failed to look up actor with name '{name}': it has ended")
    handle = ActorHandle(spec.creation.id, life, spec.class_name, spec.methods, spec.max_pending_calls)
    return cast("NamedHandle", handle)


# -- state -----------------------------------------------------------------------------------------------------------


def query(what: str, argument: str = "") -> Any:
    """Ask the broker about the node's state; see `zray.broker.status`."""
    return msgspec.msgpack.decode(current_session().request(lambda reply: wire.Query(what, reply, argument)))


def nodes() -> list[dict[str, Any]]:
    """Return a dict for each node: NodeID, Alive, NodeManagerAddress, Resources, Labels ..."""
    return query("nodes")  # type: ignore[no-any-return]


def cluster_resources() -> dict[str, float]:
    """Return the total resources."""
    return query("cluster_resources")  # type: ignore[no-any-return]


def available_resources() -> dict[str, float]:
    """Return the resources that nothing occupies now."""
    return query("available_resources")  # type: ignore[no-any-return]


def get_runtime_context() -> RuntimeContext:
    """Return a `RuntimeContext`: ids and facts of the current driver, task or actor."""
    from zray.runtime_context import RuntimeContext

    return RuntimeContext(current_session())


def get_gpu_ids() -> list[int]:
    """Return the ids of the GPUs that this task or actor may use."""
    return [int(i) for i in get_runtime_context().get_accelerator_ids()["GPU"] if i.isdigit()]


def timeline(filename: str | None = None) -> list[dict[str, Any]] | None:
    """Return what ran when as Chrome trace events (open them in ui.perfetto.dev); with a file name write them there as JSON."""
    from zray.trace_events import chrome_events

    rows = chrome_events(query("tasks", "100000"), query("events"))
    if filename is None:
        return rows
    with open(filename, "wb") as file:
        file.write(msgspec.json.encode(rows))
    return None


@signatures.remote_decorator
def remote(*args: Any, **chosen: Any) -> Any:
    """Turn a function into one whose calls run as tasks, or a class into one whose instances are actors.

    Use as `@zray.remote` or `@zray.remote(num_cpus=2, ...)`; the options are listed in `zray.options`.

    Raises:
        TypeError, ValueError: not a function or class; unknown or bad options.
    """
    if len(args) == 1 and not chosen:
        return _decorated(args[0], {})
    if args:
        raise TypeError("@zray.remote takes options by name only, e.g. @zray.remote(num_cpus=2)")
    if not chosen:
        raise TypeError("@zray.remote must be used without parentheses or with options, e.g. @zray.remote(num_cpus=2)")
    return lambda target: _decorated(target, chosen)


def _decorated(target: Any, chosen: dict[str, Any]) -> Any:
    from zray import options
    from zray.actor import ActorClass
    from zray.remote_function import remote_function

    if isinstance(target, type):
        return ActorClass(target, options.resolve("actor", chosen))
    return remote_function(target, options.resolve("function", chosen))


def _before_fork() -> None:
    session = _session
    _forking.embryo = session.store.fork_prepare() if session is not None and not session.closed else 0


def _after_fork_in_child() -> None:
    """A child that user code forked keeps what it inherited (its own pins and references), and gets sockets of its own when it needs them."""
    global _session, _submitter, _watcher, _node, _tail, _lock
    _lock = threading.RLock()
    session = _session
    if session is None or session.closed:
        return
    session.store.fork_child(_forking.embryo)
    atexit.unregister(_shutdown_at_exit)
    session.closed = True  # in this process: what was prepared for it (functions, handles) is prepared anew
    child = Session(session.config, session.store)
    child.root = session.current().apart()
    RUNNING.set(child.root)
    _node = _tail = None
    attach(child, Submitter(child))


def _after_fork_in_parent() -> None:
    return


_forking = threading.local()
"""`embryo`: the record of the child that the thread is about to fork; several threads may be."""
_registered: Callable[..., None] | None = None


def _register_fork_hooks() -> None:
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


_register_fork_hooks()
