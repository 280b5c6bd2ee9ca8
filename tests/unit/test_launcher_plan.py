"""What hosts need next: single decisions, and that every start leads to an end in few steps."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from zray.launcher import plan
from zray.launcher.config import ClusterFile, Host, Install
from zray.launcher.facts import HostFacts, NodeFacts

ALPHA = Host("alpha", "alpha")
BETA = Host("beta", "beta", port=7000, num_cpus=2.0, resources={"wheels": 4.0})
CLUSTER = ClusterFile("lab", "lab.yaml", "alpha", (ALPHA, BETA))
HEAD = plan.HeadView("10.0.0.1:6480", "key", "0.1.0", "3.11.7", frozenset({"n-beta"}))
REPLICATED = msgspec.structs.replace(CLUSTER, hosts=(ALPHA, BETA, Host("gamma", "gamma")), replicas=3)
NOTHING = frozenset[type]()


def facts(**changes: Any) -> HostFacts:
    settings: dict[str, Any] = {
        "hostname": "b",
        "directory": "/tmp/z",
        "directory_problem": "",
        "python": "3.11.2",
        "executable": "/usr/bin/python3",
        "zray": "0.1.3",
        "zray_problem": "",
        "installed": "",
        "node": None,
        "settings": plan.settings_digest(CLUSTER, BETA),
        "processes": 0,
        "address": "10.0.0.2",
        "port_problem": "",
        "time": 1000.0,
        "rsync": "",
        "has_directory": False,
    }
    return HostFacts(**{**settings, **changes})


def node(**changes: Any) -> NodeFacts:
    settings = {"node": "n-beta", "address": "10.0.0.2:7000", "head": HEAD.address, "fingerprint": "key"}
    return NodeFacts(**{**settings, **changes})


def step(found: HostFacts, head: plan.HeadView | None = HEAD, wanted: str = "", done: Any = NOTHING) -> plan.Step:
    return plan.next_step(CLUSTER, BETA, found, head, wanted, frozenset(done))


def test_a_fresh_host_is_started() -> None:
    found = step(facts())
    assert isinstance(found, plan.Start)
    assert found.arguments == (
        *("--address", "10.0.0.1:6480", "--host", "10.0.0.2", "--port", "7000", "--node-timeout", "30"),
        *("--num-cpus", "2", "--resources", '{"wheels": 4.0}'),
    )


def test_the_head_waits_for_nobody() -> None:
    found = plan.next_step(CLUSTER, ALPHA, facts(), None, "", NOTHING)
    assert isinstance(found, plan.Start)
    assert found.arguments[0] == "--head"


def test_a_node_of_the_cluster_is_left_alone() -> None:
    assert step(facts(node=node(), processes=2)) == plan.Finished("10.0.0.2:7000")


def test_a_worker_waits_for_the_head_before_it_judges_or_starts() -> None:
    assert step(facts(), None) == plan.AwaitHead()
    assert step(facts(node=node(head="elsewhere:1")), None) == plan.AwaitHead()


def test_a_changed_file_is_noted_and_restarts_nothing() -> None:
    found = step(facts(node=node(), settings="other"), wanted="digest")
    assert isinstance(found, plan.Finished)
    assert "other settings and what is installed than the file" in found.note


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head": "10.0.0.9:6480"}, "belongs to the cluster of 10.0.0.9:6480"),
        ({"fingerprint": "other"}, "key of an earlier cluster"),
        ({"node": "n-old"}, "does not count it among the living"),
    ],
)
def test_nodes_of_no_use_are_ended_once(changes: dict[str, str], words: str) -> None:
    useless = facts(node=node(**changes), processes=2)
    found = step(useless)
    assert isinstance(found, plan.End)
    assert words in found.reason
    again = step(useless, done={plan.End})
    assert isinstance(again, plan.Refused)
    assert words in again.reason


def test_a_worker_of_another_cluster_cannot_be_the_head() -> None:
    found = plan.next_step(CLUSTER, ALPHA, facts(node=node()), None, "", NOTHING)
    assert isinstance(found, plan.End)


def test_the_head_alone_is_told_of_the_tables() -> None:
    cluster = msgspec.structs.replace(CLUSTER, storage="sqlite:/var/gcs.db", head_grace=20.0)
    found = plan.next_step(cluster, ALPHA, facts(), None, "", NOTHING)
    assert isinstance(found, plan.Start)
    assert found.arguments[:5] == ("--head", "--storage", "sqlite:/var/gcs.db", "--head-grace", "20")
    found = plan.next_step(REPLICATED, ALPHA, facts(), None, "", NOTHING)
    assert isinstance(found, plan.Start)
    assert found.arguments[:3] == ("--head", "--replicas", "3")
    found = plan.next_step(REPLICATED, BETA, facts(), HEAD, "", NOTHING)
    assert isinstance(found, plan.Start)
    assert found.arguments == step(facts()).arguments  # type: ignore[union-attr]


def members(head: str = "n-beta", lost: str = "", state: str = "ALIVE") -> dict[str, Any]:
    """What `zray status --json` prints on a node of alpha's cluster."""
    rows = [{"NodeID": name, "address": f"{name}:1", "state": "ALIVE", "is_head": name == head} for name in ("n-c",)]
    rows += [{"NodeID": "n-beta", "address": "10.0.0.2:7000", "state": state, "is_head": head == "n-beta"}]
    return {"nodes": [*rows, {"NodeID": "n-alpha", "state": "DEAD"}], "cluster": {"head_lost": lost}}


def test_with_replicas_the_file_s_head_joins_a_cluster_that_another_node_leads() -> None:
    found = plan.surviving(facts(node=node(), processes=2), members())
    assert found is not None
    assert (found.address, found.node, found.alive) == ("10.0.0.2:7000", "n-beta", frozenset({"n-beta", "n-c"}))
    joining = plan.next_step(REPLICATED, ALPHA, facts(address="10.0.0.1"), found, "", NOTHING)
    assert isinstance(joining, plan.Start)
    assert joining.arguments[:2] == ("--address", "10.0.0.2:7000")
    # Nodes that were told of the old head when they joined stay; those of another cluster or that are dead for this one do not.
    stays = plan.next_step(REPLICATED, BETA, facts(node=node(head="10.0.0.1:6480")), found, "", NOTHING)
    assert stays == plan.Finished("10.0.0.2:7000")
    for changes in ({"fingerprint": "other"}, {"node": "n-alpha"}):
        useless = plan.next_step(REPLICATED, BETA, facts(node=node(**changes)), found, "", NOTHING)
        assert isinstance(useless, plan.End)


@pytest.mark.parametrize("told", [members(lost="it hangs"), members(head="none"), members(state="SILENT")])
def test_a_cluster_without_a_head_is_not_joined(told: dict[str, Any]) -> None:
    assert plan.surviving(facts(node=node(), processes=2), told) is None


def test_what_a_crash_left_is_ended_before_a_start() -> None:
    assert isinstance(step(facts(processes=1)), plan.End)


@pytest.mark.parametrize(
    ("changes", "column", "words"),
    [
        ({"python": "3.9.18"}, "python", "Python 3.9.18 is too old"),
        ({"python": "3.12.0"}, "python", "3.11.7 on the head"),
        ({"directory_problem": "not yours"}, "install", "not yours"),
        ({"zray": "", "zray_problem": "No module"}, "install", "has no zray (No module)"),
        ({"zray": "0.2.0"}, "install", "zray 0.2.0 here, 0.1.0 on the head"),
        ({"port_problem": "taken"}, "port", "taken"),
    ],
)
def test_hosts_that_cannot_take_part(changes: dict[str, Any], column: str, words: str) -> None:
    found = step(facts(**changes))
    assert isinstance(found, plan.Refused)
    assert found.column == column
    assert words in found.reason


def test_installing_comes_before_judging_versions() -> None:
    assert step(facts(zray=""), wanted="digest") == plan.Install()
    assert step(facts(zray="0.2.0", installed="old"), wanted="digest") == plan.Install()
    assert isinstance(step(facts(installed="digest"), wanted="digest"), plan.Start)
    found = step(facts(zray=""), wanted="digest", done={plan.Install})
    assert isinstance(found, plan.Refused)
    assert found.column == "install"


def test_a_node_that_ends_right_after_its_start_is_not_started_for_ever() -> None:
    found = step(facts(), done={plan.Start})
    assert found == plan.Refused("joined", "the node ended right after it began")


def perform(state: HostFacts, taken: plan.Step, wanted: str, works: bool) -> HostFacts:
    """What a host would be like after a step; one that does not work changes nothing."""
    changes: dict[str, Any] = {}
    if works and isinstance(taken, plan.Install):
        changes = {"installed": wanted, "zray": "0.1.0"}
    elif works and isinstance(taken, plan.End):
        changes = {"node": None, "processes": 0}
    elif works and isinstance(taken, plan.Start):
        changes = {"node": node(), "processes": 2}
    return msgspec.structs.replace(state, **changes)


def test_every_host_ends_in_few_steps() -> None:
    """All combinations of states, with steps that work and steps that do not."""
    choices: dict[str, list[Any]] = {
        "python": ["3.11.2", "3.9.1", "3.13.0"],
        "zray": ["0.1.3", "", "0.2.0"],
        "installed": ["", "digest"],
        "node": [None, node(), node(head="x:1"), node(fingerprint="other"), node(node="n-old")],
        "processes": [0, 3],
        "port_problem": ["", "taken"],
    }
    ends = set()
    for values in itertools.product(*choices.values()):
        for wanted, works, head_at_once in itertools.product(["", "digest"], [True, False], [True, False]):
            state = facts(**dict(zip(choices, values)))
            head = HEAD if head_at_once else None
            done: set[type] = set()
            for _ in range(8):
                taken = step(state, head, wanted, done)
                if isinstance(taken, plan.AwaitHead):
                    assert head is None
                    head = HEAD
                    continue
                assert type(taken) not in done
                done.add(type(taken))
                if isinstance(taken, plan.Finished | plan.Refused):
                    ends.add(type(taken))
                    # Asked again of the same facts, it says the same: `up` twice changes nothing.
                    assert step(state, head, wanted, done) == taken
                    if isinstance(taken, plan.Finished):
                        assert state.node == node()
                        assert step(state, head, wanted) == taken
                    break
                state = perform(state, taken, wanted, works)
            else:
                raise AssertionError(f"no end for {state}")
    assert ends == {plan.Finished, plan.Refused}


def test_digests_tell_contents_and_settings_apart() -> None:
    one = plan.install_digest([("a.whl", b"1")], [], [])
    assert one == plan.install_digest([("a.whl", b"1")], [], [])
    others = [
        plan.install_digest([("a.whl", b"2")], [], []),
        plan.install_digest([("b.whl", b"1")], [], []),
        plan.install_digest([("a.whl", b"1")], ["x"], []),
        plan.install_digest([("a.whl", b"1")], [], ["x"]),
    ]
    assert len({one, *others}) == 5
    more = msgspec.structs.replace(BETA, num_cpus=3.0)
    assert plan.settings_digest(CLUSTER, BETA) != plan.settings_digest(CLUSTER, more)
    renamed = msgspec.structs.replace(BETA, destination="other", ssh_options=("A=b",))
    assert plan.settings_digest(CLUSTER, BETA) == plan.settings_digest(CLUSTER, renamed)
    # The tables are the head's: what is said of them changes no other node.
    assert plan.settings_digest(CLUSTER, BETA) == plan.settings_digest(REPLICATED, BETA)
    assert plan.settings_digest(CLUSTER, ALPHA) != plan.settings_digest(REPLICATED, ALPHA)


# -- check -----------------------------------------------------------------------------------------------------------------


def looked(before: float = 999.9, after: float = 1000.2, **changes: Any) -> plan.Looked:
    return plan.Looked(facts(**changes), before, after)


@pytest.mark.parametrize(
    ("time", "offset"), [(1000.0, 0.0), (1000.2, 0.0), (1010.2, 10.0), (989.9, -10.0), (999.9, 0.0)]
)
def test_clocks_are_judged_by_what_the_time_of_the_answer_leaves_open(time: float, offset: float) -> None:
    assert plan.clock_offset(looked(time=time)) == pytest.approx(offset)


def columns(findings: list[plan.Finding]) -> list[tuple[str, bool]]:
    return [(finding.column, finding.fatal) for finding in findings]


def test_check_judges_each_host() -> None:
    assert plan.check_host(CLUSTER, BETA, looked(), "") == []
    assert columns(plan.check_host(CLUSTER, BETA, looked(zray="", time=2000.0, port_problem="x"), "")) == [
        ("install", True),
        ("port", True),
        ("clock", True),
    ]
    wanting = msgspec.structs.replace(CLUSTER, install=Install(requirements=("zray",)))
    assert columns(plan.check_host(wanting, BETA, looked(zray=""), "digest")) == [("install", False)]
    assert columns(plan.check_host(CLUSTER, BETA, looked(address="127.0.0.1"), "")) == [("names", True)]


def test_check_compares_with_the_head() -> None:
    head = looked(python="3.12.1", zray="0.2.0")
    findings = plan.check_together(CLUSTER, {"alpha": head, "beta": looked()})
    assert [(finding.host, finding.column) for finding in findings] == [("beta", "python"), ("beta", "install")]
    assert plan.check_together(CLUSTER, {"beta": looked()}) == []


def test_check_tells_who_cannot_reach_whom() -> None:
    targets = plan.targets(CLUSTER, {"alpha": looked(node=node(address="10.0.0.1:6480")), "beta": looked()})
    assert targets == {"alpha": "10.0.0.1:6480", "beta": "10.0.0.2:7000"}
    assert plan.targets(CLUSTER, {"beta": looked(port_problem="taken")}) == {}
    findings = plan.check_reach(targets, {"alpha": {"10.0.0.2:7000": "refused"}, "beta": {"10.0.0.1:6480": ""}})
    assert [(finding.host, finding.text) for finding in findings] == [("alpha", "cannot reach beta: refused")]
