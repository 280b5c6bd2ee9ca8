"""Options: one table, Ray's meanings, and errors that say what to write instead."""

from __future__ import annotations

import re
from types import NoneType
from typing import Any

import pytest

from zray import options
from zray.options import ACTOR, FUNCTION, METHOD, resolve, resources_of

SURFACE = [
    "num_cpus",
    "num_gpus",
    "memory",
    "resources",
    "num_returns",
    "max_retries",
    "retry_exceptions",
    "max_calls",
    "max_restarts",
    "max_task_retries",
    "max_concurrency",
    "concurrency_groups",
    "max_pending_calls",
    "scheduling_strategy",
    "label_selector",
    "name",
    "namespace",
    "lifetime",
    "get_if_exists",
    "runtime_env",
    "enable_task_events",
    "_generator_backpressure_num_objects",
    "_metadata",
]


def test_every_option_that_programs_use_is_there() -> None:
    assert set(SURFACE) <= set(options.TABLE)


def test_defaults() -> None:
    task = resolve(FUNCTION, {})
    assert task["num_cpus"] == 1
    assert task["max_retries"] == 3
    assert task["num_returns"] == 1
    assert task["retry_exceptions"] is False
    assert task["max_calls"] == 0
    actor = resolve(ACTOR, {})
    assert actor["num_cpus"] is None
    assert actor["max_restarts"] == 0
    assert actor["max_task_retries"] == 0
    assert actor["max_pending_calls"] == -1
    assert actor["lifetime"] is None
    assert actor["get_if_exists"] is False
    assert "max_retries" not in actor
    assert "max_restarts" not in task
    assert resolve(METHOD, {}) == {}
    assert resolve(METHOD, {"num_returns": 2}) == {"num_returns": 2}


@pytest.mark.parametrize("kind", [FUNCTION, ACTOR, METHOD])
def test_defaults_are_valid_and_none_means_default(kind: str) -> None:
    for name, option in options.TABLE.items():
        if kind in option.defaults:
            option.validate(name, option.defaults[kind])
            with pytest.raises(TypeError, match="The type of keyword"):
                resolve(kind, {name: object()})
            if isinstance(option.types, tuple) and NoneType in option.types:
                assert resolve(kind, {name: None})[name] == option.defaults[kind]


def test_changes_keep_the_rest() -> None:
    base = resolve(FUNCTION, {"num_cpus": 2, "name": "f"})
    changed = resolve(FUNCTION, {"num_cpus": 3}, base)
    assert changed["num_cpus"] == 3
    assert changed["name"] == "f"
    assert base["num_cpus"] == 2
    assert resolve(FUNCTION, {"num_cpus": None}, base)["num_cpus"] == 1
    assert resolve(METHOD, {"name": "m"}, {"num_returns": 2}) == {"num_returns": 2, "name": "m"}


def test_metadata_changes_by_namespace() -> None:
    base = resolve(FUNCTION, {"_metadata": {"ns1": {"a": 1, "b": 2}, "ns2": {"a": 1}}})
    changed = resolve(FUNCTION, {"_metadata": {"ns1": {"b": 3}, "ns3": {}}}, base)
    assert changed["_metadata"] == {"ns1": {"a": 1, "b": 3}, "ns2": {"a": 1}, "ns3": {}}
    assert base["_metadata"] == {"ns1": {"a": 1, "b": 2}, "ns2": {"a": 1}}


def test_texts_that_programs_match_on() -> None:
    template = f"The type of keyword '{{}}' must be {(int, type(None))}, but received type {float}"
    for name in ("max_retries", "max_calls"):
        with pytest.raises(TypeError, match=re.escape(template.format(name))):
            resolve(FUNCTION, {name: 0.5})
    for name in ("max_restarts", "max_task_retries"):
        with pytest.raises(TypeError, match=re.escape(template.format(name))):
            resolve(ACTOR, {name: 0.5})
        with pytest.raises(ValueError, match=f"The keyword '{name}' only accepts None, 0, -1 or a positive integer"):
            resolve(ACTOR, {name: -2})
    with pytest.raises(TypeError, match=re.escape(str((int, str, type(None))))):
        resolve(FUNCTION, {"num_returns": 0.5})
    for value in (-1, -7):
        with pytest.raises(ValueError, match="The keyword 'max_calls' only accepts None, 0 or a positive integer"):
            resolve(FUNCTION, {"max_calls": value})
        with pytest.raises(
            ValueError,
            match="The keyword 'num_returns' only accepts None, a non-negative integer, "
            r"'streaming' \(for generators\), or 'dynamic'",
        ):
            resolve(FUNCTION, {"num_returns": value})
    with pytest.raises(ValueError, match=r"where -1 represents infinity\."):
        resolve(FUNCTION, {"max_retries": -2})
    with pytest.raises(TypeError, match=re.escape(f"must be {(dict, type(None))}, but received type {float}")):
        resolve(ACTOR, {"_metadata": 3.14})
    for given in ({"num_gpus": 0.0000001}, {"resources": {"custom_resource": 0.0000001}}):
        with pytest.raises(ValueError, match=r"cannot go beyond 0\.0001"):
            resolve(FUNCTION, given)
    with pytest.raises(ValueError, match="quantity of resource num_cpus cannot be negative"):
        resolve(ACTOR, {"num_cpus": -1})
    with pytest.raises(ValueError, match=re.escape("Setting 'max_calls' is not supported in '.options()'.")):
        resolve(FUNCTION, {"max_calls": 1}, resolve(FUNCTION, {}))
    with pytest.raises(ValueError, match=re.escape("Setting 'concurrency_groups' is not supported in '.options()'.")):
        resolve(ACTOR, {"concurrency_groups": []}, resolve(ACTOR, {}))
    with pytest.raises(ValueError, match="Actor name cannot be an empty string"):
        resolve(ACTOR, {"name": ""})
    with pytest.raises(ValueError, match="The actor name must be specified to use `get_if_exists`"):
        resolve(ACTOR, {"get_if_exists": True})


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (FUNCTION, {"resources": {"CPU": 1}}),
        (FUNCTION, {"resources": {"memory": 1}}),
        (FUNCTION, {"resources": {"": 1}}),
        (FUNCTION, {"resources": {"x": -1}}),
        (FUNCTION, {"num_gpus": 1.5}),
        (FUNCTION, {"memory": float("nan")}),
        (FUNCTION, {"num_returns": "many"}),
        (FUNCTION, {"retry_exceptions": [1]}),
        (FUNCTION, {"retry_exceptions": [BaseException]}),
        (FUNCTION, {"_generator_backpressure_num_objects": 0}),
        (FUNCTION, {"scheduling_strategy": "BEST"}),
        (FUNCTION, {"label_selector": {"a": 1}}),
        (ACTOR, {"lifetime": "endless"}),
        (ACTOR, {"namespace": ""}),
        (ACTOR, {"max_concurrency": 0}),
        (ACTOR, {"max_pending_calls": -2}),
        (ACTOR, {"concurrency_groups": {"io": 0}}),
        (ACTOR, {"concurrency_groups": {"io": "2"}}),
    ],
)
def test_bad_values(kind: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        resolve(kind, given)


@pytest.mark.parametrize(
    "given",
    [{"num_cpus": "2"}, {"num_cpus": True}, {"max_retries": True}, {"resources": {3: 1}}, {"resources": {"x": "1"}}],
)
def test_bad_types(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        resolve(FUNCTION, given)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (FUNCTION, {"num_returns": "streaming"}),
        (FUNCTION, {"num_returns": "dynamic"}),
        (FUNCTION, {"num_returns": 0}),
        (FUNCTION, {"num_cpus": 0}),
        (FUNCTION, {"num_cpus": 0.25, "num_gpus": 0.5, "memory": 10**9, "resources": {"x": 1.5}}),
        (FUNCTION, {"retry_exceptions": (ValueError, OSError)}),
        (FUNCTION, {"retry_exceptions": True, "max_retries": -1}),
        (FUNCTION, {"scheduling_strategy": "SPREAD", "label_selector": {"zone": "in(a,b)"}}),
        (FUNCTION, {"runtime_env": {"env_vars": {"A": "1"}}, "enable_task_events": False}),
        (ACTOR, {"name": "n", "namespace": "s", "lifetime": "detached", "get_if_exists": True}),
        (ACTOR, {"concurrency_groups": {"io": 2, "compute": 4}, "max_concurrency": 8}),
        (METHOD, {"concurrency_group": "io", "num_returns": 2, "name": "m", "max_task_retries": -1}),
    ],
)
def test_good_values(kind: str, given: dict[str, Any]) -> None:
    found = resolve(kind, given)
    assert {name: found[name] for name in given} == given


@pytest.mark.parametrize(
    ("kind", "name", "text"),
    [
        (FUNCTION, "num_cpu", "Did you mean 'num_cpus'?"),
        (FUNCTION, "max_retry", "Did you mean 'max_retries'?"),
        (FUNCTION, "max_restarts", "use max_retries"),
        (FUNCTION, "lifetime", "it is an option of actor classes"),
        (ACTOR, "num_returns", "@zray.method(num_returns=...)"),
        (ACTOR, "max_retries", "max_restarts"),
        (METHOD, "num_cpus", "options of its class"),
        (FUNCTION, "colour_of_the_sky", "Valid ones are ['num_cpus'"),
    ],
)
def test_unknown_options_say_what_to_write(kind: str, name: str, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        resolve(kind, {name: 1})
    assert f"Invalid option keyword '{name}'" in str(caught.value)


def test_objects_with_keys_are_welcome() -> None:
    class Bundle:
        def keys(self) -> Any:
            return ("_metadata",)

        def __getitem__(self, key: str) -> Any:
            return {"ns": {"k": 1}}

    assert resolve(FUNCTION, Bundle())["_metadata"] == {"ns": {"k": 1}}  # type: ignore[arg-type]


def test_scheduling_strategies_are_registered() -> None:
    class Near:
        pass

    with pytest.raises(TypeError):
        resolve(FUNCTION, {"scheduling_strategy": Near()})
    options.register_scheduling_strategy(Near)
    try:
        near = Near()
        assert resolve(FUNCTION, {"scheduling_strategy": near})["scheduling_strategy"] is near
    finally:
        options._scheduling_strategies.remove(Near)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"CPU": 10_000}),
        ({"num_cpus": 0}, {}),
        ({"num_cpus": 0.5, "num_gpus": 1, "memory": 100}, {"CPU": 5000, "GPU": 10_000, "memory": 1_000_000}),
        ({"resources": {"x": 2}}, {"CPU": 10_000, "x": 20_000}),
        ({"accelerator_type": "T4"}, {"CPU": 10_000, "accelerator_type:T4": 10}),
    ],
)
def test_resources_of_tasks(given: dict[str, Any], expected: dict[str, int]) -> None:
    assert resources_of(resolve(FUNCTION, given)) == expected


@pytest.mark.parametrize(
    ("given", "placing", "running"),
    [
        ({}, {"CPU": 10_000}, {}),
        ({"memory": 1}, {"CPU": 10_000, "memory": 10_000}, {"memory": 10_000}),
        ({"num_cpus": 0}, {}, {}),
        ({"num_cpus": 2}, {"CPU": 20_000}, {"CPU": 20_000}),
        ({"num_gpus": 1}, {"CPU": 10_000, "GPU": 10_000}, {"CPU": 10_000, "GPU": 10_000}),
        ({"resources": {"x": 1}}, {"CPU": 10_000, "x": 10_000}, {"CPU": 10_000, "x": 10_000}),
    ],
)
def test_resources_of_actors(given: dict[str, Any], placing: dict[str, int], running: dict[str, int]) -> None:
    chosen = resolve(ACTOR, given)
    assert resources_of(chosen, actor=True) == placing
    assert resources_of(chosen, actor=True, running=True) == running
