"""What was deleted stays deleted: commands to streams of 3 replicas under load, and no later answer of an old life.

20 streams of the built-in `digits` model are asked without a pause by 3 clients, and learn from what they are sent.
Five more send commands, each to its part of the streams: a reset or a DELETE, in turn. As soon as a command has its
answer (200: all live replicas have followed it), the stream is asked 6 times over several connections. Neither these
answers, nor those of the clients to any request sent after the command's answer, nor a head or snapshot in the database
may carry an incarnation that was over.

    python loadtests/deletes.py [--commands 1000] [--json FILE] [--plot FILE]

It starts its own server on a free port, and can be pointed at no other one; it takes about 10 minutes on two cores.

`stale_answers` and `stale_snapshots` have to be 0. `unacknowledged` counts commands that were answered 202: a replica
had not followed within 5 s; they promise nothing, and what comes after them is not checked. `not_found` counts those
that a replica got which did not know the stream yet, begun at another within the last sync interval; they are given
again. `frozen_answers` are those
of the frozen model, which a replica gives that is cut off from the store; they are of no life.
"""

import argparse
import itertools
import random
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from loadtests import plots, report
from loadtests.chaos_traffic import Told, read_told
from loadtests.client import Encoded, encode
from loadtests.deletes_answers import Answers, Clients, Floors, wait_until
from loadtests.deletes_snapshots import Snapshots
from loadtests.errors import LoadTestError, run
from loadtests.server import OwnServer

MODEL = "digits"
REPLICAS = 3
STREAMS = 20
CLIENTS = 3
COMMANDERS = 5
COMMANDS = 1000
PROBES = 6  # requests after a command …
PROBE_CONNECTIONS = 3  # … over so many connections for each commander
ROWS = 4  # images of a request
SYNC_INTERVAL_S = 1.0
TIMEOUT_S = 60.0
TRIES_MAX = 20  # of a command whose stream is not found
LIVES_MAX_S = 60.0  # for a stream to begin again after it was deleted
TOKEN_ENV = "TTA_LOADTEST_TOKEN"  # the variable's name
STORE = "states"  # the folder

Kind = Literal["reset", "delete"]
KINDS: tuple[Kind, ...] = ("reset", "delete")


class Command(NamedTuple):
    """One command and its answer."""

    kind: Kind
    took_s: float
    status: int  # 200: all live replicas have followed; 202: not all, within the server's patience; 404: it was gone

    @property
    def acknowledged(self) -> bool:
        return self.status == httpx.codes.OK


class Server:
    """Asks and commands; may be used from any thread.

    Args:
        http: of the server.
        token: the administrator's.
        requests: by stream.
    """

    def __init__(self, http: httpx.Client, token: str, requests: dict[str, Encoded]) -> None:
        self._http = http
        self._headers = {"Authorization": f"Bearer {token}"}
        self._requests = requests

    def ask(self, stream: str) -> Told:
        """Raises:
        LoadTestError: there was no answer.
        """
        request = self._requests[stream]
        return read_told(self._call("POST", "infer", headers=request.headers, content=request.body, allowed=()).headers)

    def command(self, kind: Kind, stream: str) -> Command:
        """Raises:
        LoadTestError: it was refused.
        """
        began_s = time.monotonic()
        if kind == "reset":
            response = self._call("POST", f"streams/{stream}/reset", headers=self._headers)
        else:
            response = self._call("DELETE", f"streams/{stream}", headers=self._headers)
        return Command(kind, time.monotonic() - began_s, response.status_code)

    def incarnation(self, stream: str) -> int:
        """Of its present life; 0 where it has none."""
        response = self._call("GET", f"streams/{stream}")
        return int(response.json()["incarnation"]) if response.is_success else 0

    def _call(
        self,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        content: bytes | None = None,
        allowed: Sequence[int] = (404,),
    ) -> httpx.Response:
        try:
            response = self._http.request(method, f"/v2/models/{MODEL}/{path}", headers=headers, content=content)
        except httpx.HTTPError as error:
            raise LoadTestError(f"{method} {path}: {error or type(error).__name__}") from error
        if not response.is_success and response.status_code not in allowed:
            raise LoadTestError(f"{method} {path}: {response.status_code}: {response.text[:200]}")
        return response


def end_life(
    server: Server,
    kind: Kind,
    stream: str,
    floors: Floors,
    answers: Answers,
    probe: Callable[[str], None],
    lives_max_s: float = LIVES_MAX_S,
) -> Command:
    """End a stream's present life by a command, and look at the answers after it.

    Args:
        server: to command.
        kind: of the command.
        stream: whose life.
        floors: raised where the command was acknowledged.
        answers: of the stream so far.
        probe: asks the stream, and has the answers judged.
        lives_max_s: for the stream to live, after it was deleted before.

    Raises:
        LoadTestError: it does not begin to live, or the command was refused.
    """
    if not wait_until(lambda: server.incarnation(stream) > 0, lives_max_s):
        raise LoadTestError(f"{stream} did not begin again within {lives_max_s:.0f} s")
    # whatever anybody has told of by now is over once the command is done
    old = max(floors.of(stream), answers.newest(stream), server.incarnation(stream))
    done = server.command(kind, stream)
    if done.acknowledged:
        floors.raise_to(stream, old + 1)
        probe(stream)
    return done


def tries(end: Callable[[], Command], wait_s: float = SYNC_INTERVAL_S) -> Iterator[Command]:
    """A command, given again while the replica that gets it does not know the stream, which has just begun at another.

    Args:
        end: gives it.
        wait_s: between two tries; the store knows the stream by then.

    Raises:
        LoadTestError: it is not known for long.
    """
    for _ in range(TRIES_MAX):
        yield (done := end())
        if done.status != httpx.codes.NOT_FOUND:
            return
        time.sleep(wait_s)
    raise LoadTestError(f"a stream that lives was not found by {TRIES_MAX} commands")


def figures(commands: Sequence[Command], answers: Answers, snapshots: Snapshots) -> dict[str, float]:
    """In the names of the JSON form."""
    found: dict[str, float] = {
        "commands": len(commands),
        "checks": sum(each.acknowledged for each in commands),
        "unacknowledged": sum(each.status == httpx.codes.ACCEPTED for each in commands),
        "not_found": sum(each.status == httpx.codes.NOT_FOUND for each in commands),
        "answers_checked": answers.checked,
        "stale_answers": len(answers.stale),
        "snapshots_checked": snapshots.checked,
        "stale_snapshots": len(snapshots.stale),
        "frozen_answers": answers.frozen,
        "failed_requests": len(answers.failed),
        "replicas_seen": len(answers.replicas),
    }
    for kind in KINDS:
        took_ms = [1000 * each.took_s for each in commands if each.kind == kind]
        if took_ms:
            found |= {f"command_p{share}_ms/{kind}": float(np.percentile(took_ms, share)) for share in (50, 99)}
    return found


def missed(found: dict[str, float]) -> list[str]:
    """Which targets were."""
    return [f"{name} {found[name]:.0f}, not 0" for name in ("stale_answers", "stale_snapshots") if found[name]]


def table(found: dict[str, float]) -> Table:
    """A line for each kind of command."""
    rows = Table(title="commands", box=box.SIMPLE_HEAD)
    rows.add_column("command")
    for name in ("p50, ms", "p99, ms"):
        rows.add_column(name, justify="right")
    for kind in KINDS:
        if f"command_p50_ms/{kind}" in found:
            rows.add_row(kind, *(f"{found[f'command_p{share}_ms/{kind}']:.0f}" for share in (50, 99)))
    return rows


def summary(found: dict[str, float]) -> str:
    return (
        f"{found['commands']:.0f} commands, {found['checks']:.0f} of them checked, {found['unacknowledged']:.0f} not "
        f"acknowledged by all (202), {found['not_found']:.0f} not found and given again; "
        f"stale answers: {found['stale_answers']:.0f} of {found['answers_checked']:.0f}; "
        f"stale snapshots: {found['stale_snapshots']:.0f} of {found['snapshots_checked']:.0f}; replicas seen: "
        f"{found['replicas_seen']:.0f}; frozen answers: {found['frozen_answers']:.0f}, failed requests: "
        f"{found['failed_requests']:.0f}"
    )


def picture(found: dict[str, float]) -> list[plots.Bars]:
    kinds = [kind for kind in KINDS if f"command_p50_ms/{kind}" in found]
    series = {f"p{share}": [found[f"command_p{share}_ms/{kind}"] for kind in kinds] for share in (50, 99)}
    title = f"Until {REPLICAS} replicas under load have followed a command"
    return [plots.Bars(title, "ms, lower is better", kinds, series, numbers=True)]


def configuration() -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The model, which learns from everything and at once; the store, and who may command."""
    model = {
        "name": MODEL,
        "source": {"builtin": MODEL},
        "replicas": REPLICAS,
        "adaptation": {"gate": False, "budget": 1.0, "step_rows": ROWS, "step_wait_s": 0.1},
    }
    settings: dict[str, dict[str, Any]] = {
        "store": {"path": STORE, "sync_interval_s": SYNC_INTERVAL_S},
        "auth": {"admin_token_env": TOKEN_ENV},
    }
    return [model], settings


def requests(streams: Sequence[str]) -> dict[str, Encoded]:
    """One for each stream; there is something to learn from it."""
    from loadtests.throughput import digits  # slow to import

    images = digits().shifted
    return {
        stream: encode(images[np.arange(ROWS) + ROWS * place % len(images)], stream=stream)
        for place, stream in enumerate(streams)
    }


def command_all(
    server: Server,
    streams: Sequence[str],
    count: int,
    floors: Floors,
    answers: Answers,
    told: Callable[[int], None],
) -> list[Command]:
    """Commands from several at once, each to streams of its own, so that it knows what their lives were."""
    done: list[Command] = []
    ended: list[Command] = []  # without those that were given again
    lock = threading.Lock()
    stopping = threading.Event()  # one has failed, or the script shall end

    def ask(stream: str) -> None:
        try:
            answers.ask(stream, lambda: server.ask(stream))
        except LoadTestError as error:
            answers.failed_with(str(error))

    def probe(stream: str) -> None:
        list(connections.map(ask, itertools.repeat(stream, PROBES)))

    def command(number: int) -> None:
        own = streams[number::COMMANDERS]
        for turn in range(number, count, COMMANDERS):
            if stopping.is_set():
                return
            place = turn // COMMANDERS
            # each round over the streams begins with the other command
            kind = KINDS[(place + place // len(own)) % len(KINDS)]
            try:
                tried = [*tries(lambda: end_life(server, kind, own[place % len(own)], floors, answers, probe))]  # noqa: B023
            except LoadTestError:
                stopping.set()
                raise
            with lock:
                done.extend(tried)
                ended.append(tried[-1])
                told(len(ended))

    def keep_asking(number: int, asked: int) -> None:
        ask(random.Random(f"{number}-{asked}").choice(streams))

    with (
        ThreadPoolExecutor(PROBE_CONNECTIONS * COMMANDERS) as connections,
        Clients(keep_asking, CLIENTS),
        ThreadPoolExecutor(COMMANDERS) as commanders,
    ):
        try:
            list(commanders.map(command, range(COMMANDERS)))
        finally:
            stopping.set()
    return done


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commands", type=int, default=COMMANDS, help=f"how many (default: {COMMANDS})")
    report.add_arguments(parser)
    args = parser.parse_args()
    if args.commands < COMMANDERS:
        parser.error(f"--commands must be {COMMANDERS} or more, not {args.commands}")
    return args


def main() -> int:
    args = parse_arguments()
    report.check_outputs(args.json, args.plot)
    console = Console()
    streams = [f"camera-{number}" for number in range(STREAMS)]
    token = secrets.token_hex(16)
    floors = Floors()
    answers = Answers(floors)
    models, settings = configuration()

    def told(done: int) -> None:
        if done % 100 == 0:
            console.print(f"{done} commands, {len(answers.stale)} stale answers")

    with tempfile.TemporaryDirectory(prefix="tta-loadtest-", ignore_cleanup_errors=True) as folder:
        owned = OwnServer(models, Path(folder), settings, {TOKEN_ENV: token})
        snapshots = Snapshots(Path(folder) / STORE / MODEL / "states.db", floors)
        try:
            owned.start()
            with httpx.Client(base_url=owned.url, timeout=TIMEOUT_S) as http, snapshots:
                server = Server(http, token, requests(streams))
                for stream in streams:
                    server.ask(stream)
                commands = command_all(server, streams, args.commands, floors, answers, told)
        finally:
            owned.stop()
        snapshots.look()  # what replicas gave the store when they ended
    found = figures(commands, answers, snapshots)
    console.print(table(found))
    console.print(summary(found), soft_wrap=True)
    console.print(f"{snapshots.looks} looks at the database, {snapshots.blind} blind")
    console.print(report.machine_line(), soft_wrap=True)
    if args.json:
        report.write_json(args.json, "deletes", found)
    if args.plot:
        plots.draw(args.plot, picture(found))
    for stale in (*answers.stale[:20], *snapshots.stale[:20]):
        console.print(f"{stale.stream}: {stale.where} is of life {stale.incarnation}; {stale.floor} is the first left")
    for line in answers.failed[:20]:
        console.print(f"failed: {line}", soft_wrap=True)
    for line in (wrong := missed(found)):
        console.print(f"target missed: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
