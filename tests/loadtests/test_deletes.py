"""Commands to a stand-in for three replicas, answers and snapshots judged by hand; no server runs here."""

import io
import json
import threading

import httpx
import pytest
import torch
from rich.console import Console

from loadtests import deletes, plots
from loadtests.chaos_traffic import Told
from loadtests.client import Encoded
from loadtests.deletes import Command, Server, command_all, end_life
from loadtests.deletes_answers import Answers, Clients, Floors, Stale, wait_until
from loadtests.deletes_snapshots import Snapshots
from loadtests.errors import LoadTestError
from tta_serve.snapshots import Header, encode
from tta_serve.sqlite_store import SQLiteStore
from tta_serve.store import Head, Save


class Replicas:
    """Streams' lives as a server would keep them; `late` commands are followed by one replica only.

    Args:
        late: how many commands the other replica does not follow, though they are acknowledged.
        statuses: of the commands, in turn; 200 where there are no more.
    """

    def __init__(self, late=0, statuses=()):
        self.lives = {}
        self.behind = {}
        self.late = late
        self.statuses = list(statuses)
        self.commands = []
        self.lock = threading.Lock()  # asked and commanded from several threads

    def __call__(self, request):
        with self.lock:
            return self.answer(request)

    def answer(self, request):
        path = request.url.path.removeprefix("/v2/models/digits/")
        if path == "infer":
            stream = request.headers["x-session-id"]
            life = self.lives[stream] = abs(self.lives.get(stream, 1))
            told = self.behind.get(stream, life)
            headers = {"x-state-version": "2+1@r1", "x-state-incarnation": str(told)}
            return httpx.Response(200, headers=headers)
        stream = path.split("/")[1]
        life = self.lives.get(stream, 0)
        if request.method == "GET":
            return httpx.Response(200, json={"incarnation": life}) if life > 0 else httpx.Response(404)
        assert request.headers["authorization"] == "Bearer secret"
        kind = "reset" if path.endswith("/reset") else "delete"
        self.commands.append((kind, stream))
        self.lives[stream] = (life + 1) * (1 if kind == "reset" else -1)  # negative: begins with the next answer
        self.behind.pop(stream, None)
        if self.late:
            self.late -= 1
            self.behind[stream] = life
        return httpx.Response(self.statuses.pop(0) if self.statuses else 200, json={})


@pytest.fixture
def served():
    """A client of such a server, with its floors and answers."""

    def make(replicas, streams=("a",)):
        http = httpx.Client(base_url="http://server", transport=httpx.MockTransport(replicas))
        requests = {stream: Encoded({"x-session-id": stream}, b"") for stream in streams}
        floors = Floors()
        server, answers = Server(http, "secret", requests), Answers(floors)
        for stream in streams:
            answers.ask(stream, lambda: server.ask(stream))  # noqa: B023
        return server, floors, answers

    return make


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["reset", "delete"])
def test_a_life_is_over_once_its_command_is_acknowledged(served, kind):
    server, floors, answers = served(Replicas())
    done = end_life(server, kind, "a", floors, answers, lambda stream: answers.ask(stream, lambda: server.ask(stream)))
    assert done.acknowledged
    assert floors.of("a") == 2
    assert answers.newest("a") == 2
    assert answers.checked == 1  # the one before was to a stream that had only had one life
    assert not answers.stale


def test_an_answer_of_the_old_life_is_stale(served):
    server, floors, answers = served(Replicas(late=1))
    end_life(server, "reset", "a", floors, answers, lambda stream: answers.ask(stream, lambda: server.ask(stream)))
    assert answers.stale == [Stale("a", 1, 2, "an answer of r1")]


def test_a_command_that_not_all_have_followed_promises_nothing(served):
    server, floors, answers = served(Replicas(late=1, statuses=[202]))
    probed = []
    done = end_life(server, "reset", "a", floors, answers, probed.append)
    assert not done.acknowledged
    assert (floors.of("a"), probed) == (1, [])


def test_a_refused_command_is_an_error(served):
    server, floors, answers = served(Replicas(statuses=[401]))
    with pytest.raises(LoadTestError, match="DELETE streams/a: 401"):
        end_life(server, "delete", "a", floors, answers, lambda _: None)


def test_a_stream_that_does_not_begin_again_is_an_error(served):
    replicas = Replicas()
    server, floors, answers = served(replicas)
    replicas.lives["a"] = -2
    with pytest.raises(LoadTestError, match="did not begin again"):
        end_life(server, "reset", "a", floors, answers, lambda _: None, lives_max_s=0.0)


def test_commands_go_to_all_streams_in_turn_and_both_kinds_to_each(served):
    replicas = Replicas()
    streams = [f"camera-{number}" for number in range(2 * deletes.COMMANDERS)]
    server, floors, answers = served(replicas, streams)
    told, count = [], 4 * len(streams)
    done = command_all(server, streams, count, floors, answers, told.append)
    assert len(done) == count
    assert told == list(range(1, count + 1))
    assert {each: replicas.commands.count(each) for each in replicas.commands} == {
        (kind, stream): 2 for kind in ("reset", "delete") for stream in streams
    }
    assert dict(floors.all()) == dict.fromkeys(streams, 5)  # four commands each
    assert answers.checked >= count * deletes.PROBES
    assert not answers.stale
    assert not answers.failed


def test_a_command_whose_stream_is_not_found_is_given_again():
    statuses = [404, 404, 200, 200]
    tried = list(deletes.tries(lambda: Command("reset", 0.1, statuses.pop(0)), wait_s=0.0))
    assert [each.status for each in tried] == [404, 404, 200]
    with pytest.raises(LoadTestError, match="was not found"):
        list(deletes.tries(lambda: Command("reset", 0.1, 404), wait_s=0.0))


# -- answers ----------------------------------------------------------------------------------------------------------


def test_a_request_that_was_under_way_may_be_answered_either_way():
    floors = Floors()
    answers = Answers(floors)

    def post():
        floors.raise_to("a", 2)  # the command is acknowledged before the answer comes
        return Told(1, 5, 5, "")

    answers.ask("a", post)
    assert not answers.stale
    answers.ask("a", lambda: Told(1, 5, 6, "r2"))
    assert answers.stale == [Stale("a", 1, 2, "an answer of r2")]
    answers.ask("a", lambda: Told(0, 0, 0, ""))  # the frozen model's
    assert (answers.frozen, len(answers.stale), answers.checked) == (1, 1, 2)
    assert answers.replicas == {"r2"}


def test_clients_ask_until_the_block_ends():
    asked = []
    with Clients(lambda number, before: asked.append((number, before)), 2):
        assert wait_until(lambda: {(0, 3), (1, 3)} <= set(asked), 10)
    count = len(asked)
    assert [before for number, before in asked if number == 0][:4] == [0, 1, 2, 3]
    assert len(asked) == count


# -- snapshots --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    """A database, and how to put a life of a stream there; `inside`: the life that its snapshot says."""
    path = tmp_path / "states.db"
    store = SQLiteStore(path, "digits", "a1")
    tags = {}

    def put(stream, incarnation, version, *, inside=None, kept=()):
        def snapshot(version):
            header = Header("digits", "a1", stream, inside or incarnation, version, steps=1, at_s=0.5)
            return encode({"mean": torch.ones(2)}, header)

        head = Head(incarnation, version, {}, snapshot(version), kept)
        (number,) = store.save([Save(stream, tags.get(stream), head, {each: snapshot(each) for each in kept})])
        assert number is not None
        tags[stream] = (incarnation, version)

    yield path, put
    store.close()


def test_heads_and_what_lies_in_them_are_looked_at(stored):
    path, put = stored
    floors = Floors()
    snapshots = Snapshots(path, floors)
    put("a", 1, 3, kept=(2,))
    snapshots.look()
    assert (snapshots.checked, snapshots.stale) == (0, [])  # no life is over
    floors.raise_to("a", 2)
    put("a", 2, 4)
    snapshots.look()
    assert (snapshots.checked, snapshots.stale) == (2, [])  # the head and its snapshot
    put("a", 2, 5, kept=(4,), inside=1)
    snapshots.look()
    assert snapshots.stale == [Stale("a", 1, 2, "the snapshot 5")]  # version 4 was looked at before


def test_a_head_that_stays_when_its_life_is_over_is_stale(stored):
    path, put = stored
    floors = Floors()
    snapshots = Snapshots(path, floors)
    put("a", 1, 3, kept=(2,))
    snapshots.look()
    floors.raise_to("a", 2)
    snapshots.look()
    assert [stale.where for stale in snapshots.stale] == ["the head 3", "the snapshot 3", "the snapshot 2"]


def test_without_a_file_a_look_is_blind(tmp_path):
    snapshots = Snapshots(tmp_path / "states.db", Floors())
    snapshots.look()
    assert (snapshots.looks, snapshots.blind) == (1, 1)


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def found(tmp_path):
    commands = [
        Command("reset", 0.1, 200),
        Command("reset", 0.3, 200),
        Command("delete", 0.2, 200),
        Command("delete", 5.2, 202),
        Command("delete", 0.2, 404),
    ]
    floors = Floors()
    floors.raise_to("a", 2)
    answers = Answers(floors)
    answers.ask("a", lambda: Told(1, 5, 6, "r2"))
    return deletes.figures(commands, answers, Snapshots(tmp_path / "states.db", floors))


def test_figures(found):
    assert found["commands"] == 5
    assert found["checks"] == 3
    assert found["unacknowledged"] == 1
    assert found["not_found"] == 1
    assert found["stale_answers"] == 1
    assert found["stale_snapshots"] == 0
    assert found["replicas_seen"] == 1
    assert found["command_p50_ms/reset"] == pytest.approx(200)
    assert found["command_p99_ms/delete"] == pytest.approx(5100)  # 200 + 0.98 · 5000
    assert deletes.missed(found) == ["stale_answers 1, not 0"]


def test_what_is_printed_and_drawn(found, tmp_path):
    out = io.StringIO()
    Console(file=out, width=200).print(deletes.table(found), deletes.summary(found))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert ["reset", "200", "298"] in lines  # 100 + 0.99 · 200
    assert "stale answers: 1 of 1" in out.getvalue()
    plots.draw(tmp_path / "out.png", deletes.picture(found))
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_the_server_lets_the_script_command():
    (model,), settings = deletes.configuration()
    assert model["replicas"] == 3
    assert settings["auth"] == {"admin_token_env": deletes.TOKEN_ENV}
    assert json.dumps(model)  # plain values
