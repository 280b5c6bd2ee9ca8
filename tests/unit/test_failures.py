"""Failures: captured in one process, raised in another, still the user's exception."""

from __future__ import annotations

import copy
import linecache
import os
import pickle
import sys
import threading
import traceback
import types
from typing import Any

import pytest

from zray import errors, failures
from zray.errors import TaskError


class Plain(Exception):
    pass


class Refuses(Exception):
    """Cannot be called again with its own args."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"{host}:{port}")
        self.host = host
        self.port = port


class Doubles(Exception):
    """Can be called again, but then says something else."""

    def __init__(self, text: str) -> None:
        super().__init__(text + "!")


class WithLock(ValueError):
    def __init__(self, text: str) -> None:
        super().__init__(text, threading.Lock())
        self.lock = threading.Lock()
        self.code = 7


class Final(Exception):
    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise TypeError("nobody derives from this")


class Slots(Exception):
    __slots__ = ("where",)


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code

    @property
    def doubled(self) -> int:
        return self.code * 2


class Odd(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class OwnReduce(Exception):
    def __init__(self, lock: Any, text: str) -> None:
        super().__init__(text)
        self.lock = lock
        self.text = text

    def __reduce__(self) -> Any:
        return OwnReduce, (None, self.text)


def caught(raiser: Any, **how: Any) -> failures.Failure:
    """Return the record of what `raiser` raises, after a trip through bytes."""
    try:
        raiser()
    except BaseException as error:
        how.setdefault("function_name", "f")
        return failures.load(failures.dump(failures.capture(error, pid=11, node="here", **how)))
    raise AssertionError("nothing was raised")


def raised(error: BaseException) -> Any:
    def raiser() -> None:
        raise error

    return raiser


def trip(error: BaseException) -> TaskError:
    """Return what the caller of a task that raised `error` gets."""
    result = failures.rebuild(caught(raised(error)))
    assert isinstance(result, TaskError)
    return result


@pytest.mark.parametrize(
    "error",
    [
        Plain("a", 1),
        Refuses("host", 80),
        Doubles("text"),
        WithLock("w"),
        Final("f"),
        KeywordOnly(code=3),
        OwnReduce(threading.Lock(), "text"),
        ValueError("x"),
        KeyError("k"),
        OSError(2, "No such file", "name"),
        FileNotFoundError(2, "No such file", "name"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        StopIteration(5),
        ImportError("no", name="mod", path="p"),
        ZeroDivisionError(),
        errors.GetTimeoutError("slow"),
        errors.WorkerCrashedError(death=errors.Death(errors.DeathCause.EXIT(3))),
    ],
    ids=lambda error: type(error).__name__,
)
def test_caught_by_its_own_type(error: Exception) -> None:
    result = trip(error)
    assert isinstance(result, type(error))
    assert type(result.cause) is type(error)
    with pytest.raises(type(error)):
        raise result
    again = pickle.loads(pickle.dumps(result))
    assert isinstance(again, type(error))
    assert isinstance(again, TaskError)
    assert str(again) == str(result)
    assert str(copy.copy(result)) == str(result)


def test_attributes_arrive() -> None:
    refused = trip(Refuses("host", 80))
    assert (refused.host, refused.port, refused.args) == ("host", 80, ("host:80",))
    assert trip(KeywordOnly(code=3)).doubled == 6
    assert trip(Doubles("text")).args == ("text!",)
    missing = trip(OSError(2, "No such file", "name"))
    assert isinstance(missing, FileNotFoundError)
    assert (missing.errno, missing.strerror, missing.filename) == (2, "No such file", "name")
    decode = trip(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"))
    assert (decode.encoding, decode.object, decode.end) == ("utf-8", b"\xff", 1)
    assert trip(StopIteration(5)).value == 5
    assert trip(ImportError("no", name="mod")).name == "mod"
    assert trip(KeyError("k")).args == ("k",)
    slots = Slots("s")
    slots.where = 3
    assert trip(slots).where == 3
    assert trip(Plain("a", 1)).args == ("a", 1)


def test_what_cannot_be_pickled_is_named() -> None:
    result = trip(WithLock("w"))
    assert result.code == 7
    assert result.args[0] == "w"
    assert "lock" in repr(result.args[1])
    assert "not serializable" in repr(result.lock)


def test_text_joins_frames_place_and_call_site() -> None:
    def inner() -> None:
        raise ValueError("seven")

    def outer() -> None:
        inner()

    record = caught(outer, function_name="mod.outer", task_id=b"\xab" * 16)
    error = failures.rebuild(record, site="driver.py:10")
    lines = str(error).splitlines()
    assert lines[0] == "zray::mod.outer() (pid=11, node=here)"
    assert lines[1] == "  called at driver.py:10"
    assert lines[-1] == "ValueError: seven"
    assert "in inner" in str(error)
    assert "in outer" in str(error)
    assert str(error).count("ValueError: seven") == 1
    assert "Traceback (most recent call last)" not in str(error)
    assert isinstance(error, TaskError)
    assert error.function_name == "mod.outer"
    assert error.call_site == "driver.py:10"
    assert error.task_id == "ab" * 16
    assert (error.pid, error.node, error.actor_id) == (11, "here", None)
    assert error.traceback_str == str(error)
    assert error.failure.hops[0].call_site == "driver.py:10"
    shown = "".join(traceback.format_exception(error))
    assert "zray.errors.TaskError(ValueError): zray::mod.outer()" in shown


def test_actor_line() -> None:
    record = caught(raised(Plain()), function_name="A.f", actor_id=b"\1" * 16, actor_repr="<A (1)>")
    title = str(failures.rebuild(record)).splitlines()[0]
    assert title == f"zray::A.f() (pid=11, node=here, actor_id={'01' * 16}, repr=<A (1)>)"


def test_frames_of_zray_are_left_out() -> None:
    """Code that claims to be a file of the package appears nowhere, whether around the user's code or inside it."""
    name = os.path.join(os.path.dirname(failures.__file__), "worker.py")
    space: dict[str, Any] = {}
    exec(compile("def run(f):\n    return f()\n", name, "exec"), space)
    compiled: dict[str, Any] = {}
    exec(compile("def get(e):\n    raise e\n", "zray/_store.pyx", "exec"), compiled)

    def user() -> None:
        compiled["get"](ValueError("v"))

    text = str(failures.rebuild(caught(lambda: space["run"](user))))
    assert "in user" in text
    assert "worker.py" not in text
    assert "_store.pyx" not in text
    library = os.path.join(os.path.dirname(failures.__file__), "util", "pool.py")
    assert not failures._is_ours(library)
    assert failures._is_ours(os.path.join(os.path.dirname(failures.__file__), "broker", "server.py"))
    assert not failures._is_ours("/somewhere/else/worker.py")


def test_nested_failures_keep_the_class_and_show_each_hop_once() -> None:
    def bar() -> None:
        raise Refuses("host", 80)

    first = caught(bar, function_name="bar")
    sites = ["foo.py:3", "baz.py:4"]

    def foo() -> None:
        raise failures.rebuild(first, site=sites[0])

    second = caught(foo, function_name="foo")

    def baz() -> None:
        raise failures.rebuild(second, site=sites[1])

    error = failures.rebuild(caught(baz, function_name="baz"), site="driver.py:5")
    assert isinstance(error, Refuses)
    assert isinstance(error, TaskError)
    assert type(error.cause) is Refuses
    assert error.port == 80
    text = str(error)
    for part in ("zray::baz()", "zray::foo()", "zray::bar()", "driver.py:5", "baz.py:4", "foo.py:3", "in bar"):
        assert text.count(part) == 1, part
    assert text.index("baz()") < text.index("foo()") < text.index("bar()")
    assert text.count("zray.errors.TaskError(Refuses): ") == 2
    assert text.splitlines()[-1].endswith("Refuses: host:80")


def test_failed_input() -> None:
    inner = caught(raised(Plain("p")), function_name="a")
    error = failures.rebuild(failures.because_of_input(inner, function_name="b", task_id=b"\2" * 16, pid=5))
    assert isinstance(error, Plain)
    assert isinstance(error, TaskError)
    assert "zray::b() (pid=5)" in str(error)
    assert "At least one of the input arguments for this task could not be computed" in str(error)
    assert "zray::a()" in str(error)

    crash = failures.from_error(errors.WorkerCrashedError("The worker died unexpectedly"))
    error = failures.rebuild(failures.because_of_input(crash, function_name="b"))
    assert isinstance(error, errors.WorkerCrashedError)
    assert isinstance(error, TaskError)
    assert "The worker died unexpectedly" in str(error)
    assert isinstance(error.cause, errors.WorkerCrashedError)


def test_errors_of_the_system_are_raised_as_they_are() -> None:
    crash = errors.WorkerCrashedError(death=errors.Death(errors.DeathCause.SIGKILL))
    error = failures.rebuild(failures.load(failures.dump(failures.from_error(crash))), site="driver.py:10")
    assert type(error) is errors.WorkerCrashedError
    assert error.cause is errors.DeathCause.SIGKILL
    assert "called at driver.py:10" in str(error)
    assert str(failures.rebuild(failures.from_error(crash))) == str(crash)
    user = caught(raised(Plain()))
    assert failures.from_error(failures.rebuild(user)).hops == user.hops


def test_cause_chain() -> None:
    def raiser() -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise Refuses("host", 80) from error

    error = failures.rebuild(caught(raiser))
    assert isinstance(error, TaskError)
    assert isinstance(error.__cause__, KeyError)
    assert error.__cause__.args == ("inner",)
    assert isinstance(error.cause.__cause__, KeyError)  # type: ignore[union-attr]
    assert "direct cause" in str(error)
    assert str(error).index("KeyError") < str(error).index("Refuses")

    def during() -> None:
        try:
            raise KeyError("inner")
        except KeyError:
            raise Plain("p") from None

    error = failures.rebuild(caught(during))
    assert error.__suppress_context__
    assert isinstance(error, TaskError)
    assert isinstance(error.cause.__context__, KeyError)  # type: ignore[union-attr]
    assert "KeyError" not in str(error)


def test_endless_chains_end() -> None:
    first = Plain("0")
    error: BaseException = first
    for n in range(1, 50):
        following = Plain(str(n))
        following.__cause__ = error
        error = following
    first.__cause__ = error  # a circle
    result = trip(error)
    length = 0
    link: BaseException | None = result
    while link is not None and length < 100:
        link = link.__cause__
        length += 1
    assert 10 <= length <= 20


def test_groups() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("groups came with Python 3.11")
    group = ExceptionGroup("several", [ValueError("v"), TypeError("t")])  # noqa: F821
    result = trip(group)
    assert isinstance(result, ExceptionGroup)  # noqa: F821
    assert [type(one) for one in result.exceptions] == [ValueError, TypeError]
    assert "ValueError: v" in str(result)
    space: dict[str, Any] = {"result": result, "found": []}
    exec(
        "try:\n    raise result\nexcept* ValueError as e:\n    found.append(e)\nexcept* TypeError as e:\n    pass",
        space,
    )
    assert len(space["found"][0].exceptions) == 1


def test_notes() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("notes came with Python 3.11")
    error = Plain("p")
    error.add_note("look here")
    result = trip(error)
    assert result.__notes__ == ["look here"]
    assert "".join(traceback.format_exception(result)).count("look here") == 1


def test_exceptions_that_must_not_be_raised_by_their_type() -> None:
    """A SystemExit or KeyboardInterrupt of a worker does not end the caller."""
    for error in (SystemExit(3), KeyboardInterrupt(), GeneratorExit()):
        result = trip(error)
        assert type(result) is TaskError
        assert type(result.cause) is type(error)


def test_classes_of_the_main_program_and_of_functions() -> None:
    class Local(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(a)
            self.b = b

    result = trip(Local(1, 2))
    assert isinstance(result, Local)
    assert result.b == 2

    main = types.ModuleType("__main__")
    exec("class InMain(Exception):\n    pass\n", main.__dict__)
    result = trip(main.InMain("m"))
    assert type(result.cause) is main.InMain


def test_a_module_the_caller_lacks_gives_a_stand_in() -> None:
    name = "a_module_only_the_worker_has"
    module = sys.modules[name] = types.ModuleType(name)
    try:
        exec(f"class Alone(LookupError):\n    __module__ = {name!r}\n", module.__dict__)
        record = caught(raised(module.Alone("lost")))
    finally:
        del sys.modules[name]
    result = failures.rebuild(record)
    assert isinstance(result, LookupError)
    assert isinstance(result, TaskError)
    assert type(result.cause).__name__ == "Alone"
    assert str(result.cause) == "lost"
    assert "cannot be rebuilt here" in str(result)
    assert name in str(result)


def test_a_class_that_cannot_travel_at_all() -> None:
    lock = threading.Lock()

    class Captures(ValueError):
        def hold(self) -> Any:
            return lock

    result = trip(Captures("c"))
    assert isinstance(result, ValueError)
    assert type(result.cause).__name__ == "Captures"
    assert "isn't serializable" in str(result)


def test_capture_never_raises() -> None:
    record = caught(raised(Odd("x")))
    assert "Odd" in str(failures.rebuild(record))
    deep = 0

    def down() -> None:
        nonlocal deep
        deep += 1
        down()

    record = caught(down)
    assert deep > 50
    result = failures.rebuild(record)
    assert isinstance(result, RecursionError)
    assert len(str(result)) < 10_000
    long = caught(raised(Plain("x" * 1_000_000)))
    assert len(long.text()) < 100_000
    assert "left out" in long.text()


def test_a_class_that_cannot_be_subclassed_is_a_task_error(caplog: pytest.LogCaptureFixture) -> None:
    class Meta(type):
        def __new__(mcs, name: str, bases: Any, space: Any) -> Any:
            if len(bases) > 1:
                raise TypeError("one base only")
            return super().__new__(mcs, name, bases, space)

    class Single(Exception, metaclass=Meta):
        pass

    with caplog.at_level("WARNING", logger="zray"):
        result = trip(Single("s"))
    assert type(result) is TaskError
    assert type(result.cause) is Single
    assert "`error.cause` is the exception itself" in caplog.text


def test_joint_classes_are_made_once() -> None:
    assert type(trip(Plain(1))) is type(trip(Plain(2)))
    assert type(trip(Plain(1))).__name__ == "TaskError(Plain)"


def test_call_site_is_the_users_line() -> None:
    site = failures.call_site()
    name, _, line = site.rpartition(":")
    assert name == __file__
    assert "failures.call_site()" in linecache.getline(name, int(line))


def test_load_refuses_other_data() -> None:
    with pytest.raises(TypeError, match="not a failure record"):
        failures.load(pickle.dumps([1]))


def test_a_record_for_a_full_store() -> None:
    assert len(failures.NO_ROOM_DATA) <= 40
    error = failures.rebuild(failures.load(failures.NO_ROOM_DATA))
    assert type(error) is errors.ZraySystemError
    assert "no room" in str(error)
    later = failures.because_of_input(failures.load(failures.NO_ROOM_DATA), function_name="f")
    assert isinstance(failures.rebuild(failures.load(failures.dump(later))), TaskError)
