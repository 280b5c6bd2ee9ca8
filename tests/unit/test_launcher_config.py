"""The cluster's file: what is read, and what is said about mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("yaml", reason="PyYAML is not installed (extra: cluster)")

from zray.gcs.storage import check_name
from zray.launcher import config, hostlist
from zray.launcher.yaml_text import ConfigError

HOSTS = "hosts: [alpha]\n"
THREE = "hosts: ['n[1-3]']\n"


def read(text: str, file: str = "/place/lab.yaml") -> config.ClusterFile:
    return config.read(text, file)


def problems(text: str) -> list[tuple[int, str, str]]:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return [tuple(problem) for problem in caught.value.problems]


def test_a_short_file_is_enough() -> None:
    cluster = read("name: lab\nhosts: [alpha, me@beta]\n")
    assert cluster.head == "alpha"
    assert [(host.name, host.destination) for host in cluster.hosts] == [("alpha", "alpha"), ("beta", "me@beta")]
    assert {host.directory for host in cluster.hosts} == {"/tmp/zray-{uid}-lab"}
    assert {host.port for host in cluster.hosts} == {6480}
    assert not cluster.install.wanted
    assert cluster.timeout == 30.0


def test_what_stands_at_the_top_holds_for_all_hosts_and_is_replaced_or_added_to_by_theirs() -> None:
    cluster = read(
        "name: lab\nhead: beta\nport: 7000\npython: python3.12\nnum_cpus: 4\nenv: {A: one, B: two}\nlabels: {zone: east}\n"
        "object_store_memory: 2GiB\n"
        "hosts:\n  - alpha\n  - {name: beta, port: 7001, env: {B: three, C: four}, num_cpus: 0.5, memory: 1.5G}\n"
    )
    alpha, beta = cluster.hosts
    assert (alpha.port, alpha.env, alpha.num_cpus) == (7000, {"A": "one", "B": "two"}, 4.0)
    assert (beta.port, beta.env, beta.num_cpus) == (7001, {"A": "one", "B": "three", "C": "four"}, 0.5)
    assert (alpha.object_store_memory, beta.memory) == (2 << 30, 1_500_000_000)
    assert beta.labels == {"zone": "east"}
    assert beta.python == "python3.12"
    assert cluster.head == "beta"


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("memory", ""),
        ("sqlite:/var/lib/zray/gcs.db?sync=full", "storage sqlite"),
        ("redis://:secret@[fd00::1]:6379/0?prefix=lab", "storage redis"),
        ("rediss://redis.example", "storage rediss"),
        ("redis+unix:///run/redis.sock?db=2", "storage redis+unix"),
    ],
)
def test_storages_are_those_that_nodes_take(storage: str, words: str) -> None:
    cluster = read(f"name: lab\n{HOSTS}storage: '{storage}'\nhead_grace: 5\n")
    assert (cluster.storage, cluster.replicas, cluster.head_grace) == (storage, 1, 5.0)
    assert check_name(storage)
    assert cluster.tables == words, "and no password is shown"
    assert cluster.outlives_head == (storage != "memory")


def test_replicas() -> None:
    cluster = read(f"name: lab\n{THREE}replicas: 3\n")
    assert (cluster.replicas, cluster.tables, cluster.outlives_head) == (3, "3 replicas", True)
    assert not read(f"name: lab\n{THREE}replicas: 1\n").outlives_head


def test_words_that_yaml_would_guess_types_of_stay_what_was_written() -> None:
    cluster = read("name: on\nhosts: [no, 0123, 1e3]\nenv: {COUNTRY: no, VERSION: 1.10, EMPTY: ''}\n")
    assert cluster.name == "on"
    assert [host.name for host in cluster.hosts] == ["no", "0123", "1e3"]
    assert cluster.hosts[0].env == {"COUNTRY": "no", "VERSION": "1.10", "EMPTY": ""}


def test_ranges_and_merged_mappings() -> None:
    cluster = read(
        "name: lab\nhosts:\n  - &first {name: 'gpu[01-03]', num_gpus: 2}\n  - {<<: *first, name: big, num_gpus: 8}\n"
    )
    assert [(host.name, host.num_gpus) for host in cluster.hosts] == [
        ("gpu01", 2),
        ("gpu02", 2),
        ("gpu03", 2),
        ("big", 8),
    ]


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    for name in ("zray-1.whl", "other-2.whl", "notes.txt"):
        (tmp_path / "dist" / name).touch()
    text = f"name: lab\n{HOSTS}ssh: {{config: keys/ssh_config}}\ninstall: {{wheels: dist}}\n"
    cluster = read(text, str(tmp_path / "lab.yaml"))
    assert cluster.ssh.config == str(tmp_path / "keys/ssh_config")
    assert [Path(wheel).name for wheel in cluster.install.wheels] == ["other-2.whl", "zray-1.whl"]
    assert cluster.install.directory == "~/.zray-cluster/lab"


@pytest.mark.parametrize(
    ("text", "line", "key", "words"),
    [
        ("", 1, "", "the file is empty"),
        ("name: [", 1, "", "not YAML"),
        ("name: a\n--- \nname: b\n", 2, "", "not YAML"),
        ("- a\n", 1, "", "must be a mapping"),
        ("name: lab\n", 1, "", "hosts is missing"),
        ("hosts: [a]\n", 1, "", "name is missing"),
        ("name: lab\nhosts: []\n", 2, "hosts", "at least one host"),
        ("name: lab\nhosts: alpha\n", 2, "hosts", "must be a list"),
        (f"name: lab\n{HOSTS}prot: 5\n", 3, "prot", "unknown key; did you mean port?"),
        (f"name: lab\n{HOSTS}xyzzy: 5\n", 3, "xyzzy", "unknown key; known are"),
        (f"name: lab\n{HOSTS}name: other\n", 3, "name", "stands here again; it was first in line 1"),
        (f"name: a/b\n{HOSTS}", 1, "name", "is not a name"),
        (f"name: lab\n{HOSTS}port: many\n", 3, "port", "must be a whole number, not 'many'"),
        (f"name: lab\n{HOSTS}port: 70000\n", 3, "port", "between 1 and 65535"),
        (f"name: lab\n{HOSTS}timeout: nan\n", 3, "timeout", "must be between"),
        (f"name: lab\n{HOSTS}num_cpus: -1\n", 3, "num_cpus", "at least 0"),
        (f"name: lab\n{HOSTS}memory: plenty\n", 3, "memory", "must be bytes"),
        (f"name: lab\n{HOSTS}head: beta\n", 3, "head", "'beta' is none of the hosts: alpha"),
        (f"name: lab\n{HOSTS}env: [A]\n", 3, "env", "must be a mapping"),
        (f"name: lab\n{HOSTS}env:\n  A B: c\n", 4, "env", "cannot be a variable's name"),
        (f"name: lab\n{HOSTS}env: {{ZRAY_RUNTIME_DIR: /x}}\n", 3, "env", "is set by the launcher"),
        (f"name: lab\n{HOSTS}env: {{A: [b]}}\n", 3, "env.A", "must be a text, not a list"),
        (f"name: lab\n{HOSTS}resources: {{CPU: 4}}\n", 3, "resources", "has a key of its own: num_cpus"),
        (f"name: lab\n{HOSTS}directory: relative\n", 3, "directory", "an absolute directory"),
        (f'name: lab\n{HOSTS}directory: "/tmp/it\'s"\n', 3, "directory", "an absolute directory"),
        (f"name: lab\n{HOSTS}install: {{}}\n", 3, "install", "needs wheels or requirements"),
        (
            f"name: lab\n{HOSTS}install:\n  wheels: [none.whl]\n",
            4,
            "install.wheels[0]",
            "there is no file /place/none.whl",
        ),
        (f"name: lab\n{HOSTS}ssh: {{optons: [A=b]}}\n", 3, "ssh.optons", "did you mean options?"),
        ("name: lab\nhosts:\n  - alpha\n  - alpha\n", 4, "hosts[1]", "host alpha was named in line 3 already"),
        (
            "name: lab\nhosts:\n  - name: a\n    destination: -oProxyCommand=x\n",
            4,
            "hosts[0].destination",
            "is not a destination",
        ),
        ("name: lab\nhosts:\n  - {name: 'a[1-2]', address: b}\n", 3, "hosts[0]", "address cannot be that of 2 hosts"),
        ("name: lab\nhosts:\n  - {name: 'a[1-'}\n", 3, "hosts[0]", "bracket without its other half"),
        (
            "name: lab\nhosts:\n  - {name: a, destination: x}\n  - {name: b, destination: x, port: 2}\n",
            3,
            "hosts",
            "set 'directory' of each",
        ),
        (
            "name: lab\nhosts:\n  - {name: a, address: x}\n  - {name: b, address: x}\n",
            3,
            "hosts",
            "same address and port",
        ),
        (f"name: lab\n{HOSTS}storage: postgres://x\n", 3, "storage", "is no storage: memory, sqlite:PATH"),
        (f"name: lab\n{HOSTS}storage: [memory]\n", 3, "storage", "must be a text"),
        (f"name: lab\n{HOSTS}storage: sqlite:gcs.db\n", 3, "storage", "must be absolute"),
        (f"name: lab\n{HOSTS}storage: sqlite:/tmp/zray-{{uid}}-lab/a\n", 3, "storage", "which `down` removes"),
        (f"name: lab\n{HOSTS}storage: redis://\n", 3, "storage", "must be redis://HOST:PORT/DB"),
        (f"name: lab\n{HOSTS}storage: rediss://h:many/0\n", 3, "storage", "must be rediss://HOST:PORT/DB"),
        (f"name: lab\n{HOSTS}storage: redis+unix://s\n", 3, "storage", "must be redis+unix:///SOCKET"),
        (f"name: lab\n{HOSTS}replicas: 2\n", 3, "replicas", "must be 1 or 3, not 2"),
        (f"name: lab\n{HOSTS}replicas: 3\n", 3, "replicas", "3 replicas need as many hosts; there is 1"),
        (f"name: lab\nreplicas: 3\n{THREE}storage: sqlite:/x\n", 4, "storage", "replicas (line 2) keep the tables in"),
        (f"name: lab\nreplicas: 3\n{THREE}head_grace: 0\n", 4, "head_grace", "above 0 with replicas"),
        (f"name: lab\n{HOSTS}head_grace: -1\n", 3, "head_grace", "must be between 0 and 3600"),
        ("name: lab\nhosts:\n  - &a {name: *a}\n", 3, "hosts[0].name", "is nested in itself"),
        ("name: lab\nhosts: [a]\nenv: &e\n  A: *e\n", 3, "env.A", "is nested in itself"),
    ],
)
def test_mistakes_are_told_with_line_and_key(text: str, line: int, key: str, words: str) -> None:
    found = problems(text)
    assert [(place, path) for place, path, _ in found][:1] == [(line, key)], found
    assert words in found[0][2]


def test_all_mistakes_are_told_at_once_in_their_order() -> None:
    with pytest.raises(ConfigError) as caught:
        read("nam: lab\nhosts: [alpha]\nport: 0\ntimeout: soon\n")
    assert str(caught.value).splitlines() == [
        "/place/lab.yaml:1: name is missing",
        "/place/lab.yaml:1: nam: unknown key; did you mean name?",
        "/place/lab.yaml:3: port: must be between 1 and 65535, not 0",
        "/place/lab.yaml:4: timeout: must be a number, not 'soon'",
    ]


def test_aliases_of_aliases_end() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    assert "aliases of aliases" in problems("\n".join(lines))[0][2]


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        config.load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load(tmp_path / "bad.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no cluster file"):
        config.find(None)
    (tmp_path / "cluster.yaml").touch()
    assert config.find(None) == Path("cluster.yaml")
    assert config.find("other") == Path("other")


def test_hosts_are_chosen_by_name_and_range() -> None:
    cluster = read("name: lab\nhead: n3\nhosts: ['n[1-4]', last]\n")

    def chosen(*names: str) -> list[str]:
        return [host.name for host in config.select(cluster, names)]

    assert chosen() == chosen("all") == ["n1", "n2", "n3", "n4", "last"]
    assert chosen("head") == ["n3"]
    assert chosen("last,n1", "n[2-3]") == ["n1", "n2", "n3", "last"]
    with pytest.raises(ValueError, match="no host n9"):
        chosen("n9")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a", ["a"]),
        ("a[1-3]", ["a1", "a2", "a3"]),
        ("a[08-10]x", ["a08x", "a09x", "a10x"]),
        ("a[1,5-6]b[1-2]", ["a1b1", "a1b2", "a5b1", "a5b2", "a6b1", "a6b2"]),
    ],
)
def test_ranges(pattern: str, names: list[str]) -> None:
    assert hostlist.expand(pattern) == names


@pytest.mark.parametrize(
    "pattern", ["a[", "a]", "a[]", "a[x]", "a[3-1]", "a[1-2-3]", "a[0-999999]", "a[1-999]b[1-999]"]
)
def test_bad_ranges(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"\[|\]"):
        hostlist.expand(pattern)
