"""`await ref` and `ref.future()`: results that arrive without a thread blocking for each.

Covers one watcher thread per process, started when first needed, which waits for any of the watched results and resolves their futures.
Does not cover waiting itself (`zray.session`, the store).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from typing import TYPE_CHECKING, Any

from zray import failures
from zray.object_store import Failed, ObjectRef

if TYPE_CHECKING:
    from zray.session import Session


class ResultWatcher:
    """Resolves futures of references. Thread-safe."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._lock = threading.Lock()
        self._added: list[tuple[ObjectRef, concurrent.futures.Future[Any]]] = []
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._failure: Exception | None = None
        """Why nothing can be waited for any more: the broker is gone."""

    def future(self, ref: ObjectRef) -> concurrent.futures.Future[Any]:
        """Return a future that receives the value of a reference, or its error."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        session = self.session
        session.check_open()
        if session.store.done(ref):
            self._resolve(ref, future)
            return future
        session.flush()
        session.want([ref])
        with self._lock:
            if self._failure is not None:
                future.set_exception(self._failure)
                return future
            if self._stopping:
                _cancel(future)
                return future
            self._added.append((ref, future))
            if self._thread is None:
                thread = threading.Thread(target=self._loop, name="zray-results", daemon=True)
                thread.start()
                self._thread = thread  # only now: an interrupted start is done again
        session.store.ring(session.store.process)
        return future

    async def awaiting(self, ref: ObjectRef) -> Any:
        """Wait for a reference in an event loop."""
        return await asyncio.wrap_future(self.future(ref))

    def _resolve(self, ref: ObjectRef, future: concurrent.futures.Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            value = self.session._value_again(ref, None)
            if type(value) is Failed:
                future.set_exception(failures.rebuild(value.record, site=ref.site))
            else:
                future.set_result(value)
        except KeyboardInterrupt:  # in the thread that asked for the future
            raise
        except BaseException as error:
            future.set_exception(error)

    def _loop(self) -> None:
        store = self.session.store
        watched: list[tuple[ObjectRef, concurrent.futures.Future[Any]]] = []
        while not self._stopping:
            rings = store.rings()  # before looking: what is added from now on rings once more
            with self._lock:
                watched += self._added
                self._added.clear()
            refs = [ref for ref, _ in watched]
            try:
                if refs:
                    store.wait(refs, 1, 1.0, True, False, rings)
                else:
                    store.wait_ring(1.0, rings)
            except Exception as error:
                with self._lock:
                    self._failure = error
                    watched += self._added
                    self._added.clear()
                for _, future in watched:
                    if future.set_running_or_notify_cancel():
                        future.set_exception(error)
                return
            rest = []
            for ref, future in watched:
                if store.done(ref):
                    self._resolve(ref, future)
                else:
                    rest.append((ref, future))
            watched = rest
            refs.clear()
            rest = ref = future = None  # type: ignore[assignment]  # what was resolved is not held until the next comes
        for _, future in watched + self._added:  # nothing is added once it stops
            _cancel(future)

    def stop(self) -> None:
        """End the thread; futures that are still open are cancelled."""
        with self._lock:
            self._stopping = True
        thread = self._thread
        if thread is not None:
            self.session.store.ring(self.session.store.process)
            thread.join()


def _cancel(future: concurrent.futures.Future[Any]) -> None:
    """Cancel a future of our own and tell `concurrent.futures.wait` and `as_completed`, as executors do."""
    if future.cancel():
        future.set_running_or_notify_cancel()
