"""The load generator at a fixed rate: `hey` (Jaana Dogan, github.com/rakyll/hey; Debian package `hey`).

A process of hey sends one body over and over. A stream of a single image is not like any source, so each connection is
a process of its own with an image of its own; they start one after the other, so they do not send in step either.

The limiter is closed-loop: a connection sends at its next tick, and the ticks that pass while it waits for an answer
are lost. What a client who sends regardless would have felt during a stall (its requests queue, each waits) is
therefore missing from the percentiles: coordinated omission. A p99 here is a lower bound, and the rate that was reached
has to be read beside it; where it falls short of what was asked for, requests were left out.
"""

import csv
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from loadtests.client import Encoded
from loadtests.errors import LoadTestError, MissingTool
from loadtests.wrk import TIMEOUT_S, Load

LATE_MAX = 10  # the interval may take this many times as long before it is given up


def check_installed() -> str:
    """The program's path.

    Raises:
        MissingTool: it is not installed.
    """
    program = shutil.which("hey")
    if program is None:
        raise MissingTool("the load generator hey is not installed: apt install hey (Debian package `hey`)")
    return program


def load(url: str, requests: Sequence[Encoded], rate: float, seconds: float) -> Load:
    """Post each request over and over on a connection of its own, all together `rate` times a second.

    How many are sent is fixed: a server that is too slow for the rate makes the interval longer.

    Args:
        url: of the route.
        requests: one for each connection.
        rate: requests per second of all connections together.
        seconds: how long, at that rate.

    Raises:
        MissingTool: hey is not installed.
        LoadTestError: it failed, got no answer at all, or did not end.
    """
    program = check_installed()
    count = max(1, round(rate * seconds / len(requests)))
    options = [f"-n={count}", "-c=1", f"-q={rate / len(requests)}", f"-t={TIMEOUT_S}", "-o=csv", "-cpus=1"]
    end_s = time.monotonic() + LATE_MAX * seconds + TIMEOUT_S
    with tempfile.TemporaryDirectory(prefix="tta-loadtest-") as folder, ExitStack() as stack:
        connections = []
        for number, request in enumerate(requests):
            body = Path(folder) / f"{number}.body"
            body.write_bytes(request.body)
            headers = [f"-H={name}: {value}" for name, value in request.headers.items()]
            command = [program, *options, "-disable-compression", "-m=POST", f"-D={body}", *headers, url]
            started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            connections.append(stack.enter_context(started))
            stack.callback(started.kill)  # before it is waited for; one that has ended does not mind
        outputs = [_output(each, max(0.0, end_s - time.monotonic())) for each in connections]
    return parse(outputs, sent=count * len(requests))


def _output(connection: subprocess.Popen[str], timeout_s: float) -> str:
    try:
        output, errors = connection.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise LoadTestError(f"hey did not end within {LATE_MAX} times its interval") from None
    if connection.returncode != 0:
        raise LoadTestError(f"hey ended with exit code {connection.returncode}: {(errors or output).strip()[-500:]}")
    return output


def parse(outputs: Sequence[str], sent: int) -> Load:
    r"""The figures from the CSV of all connections: a line for each answer. What has no line was not answered.

    Times are in seconds; `offset` is when the request was sent, since its process began.

    Args:
        outputs: what each process printed.
        sent: requests of all of them.

    >>> head = "response-time,status-code,offset"
    >>> parse([f"{head}\n0.0100,200,0.5", f"{head}\n0.0300,200,0.97\n0.0200,429,0.3"], sent=4)
    Load(answered=2, refused=1, failed=1, duration_s=1.0, p50_ms=20.0, p99_ms=30.0)
    """
    rows = [row for output in outputs for row in csv.DictReader(output.strip().splitlines())]
    try:
        codes = [int(row["status-code"]) for row in rows]
        took_s = [float(row["response-time"]) for row in rows]
        ends_s = [float(row["offset"]) + took for row, took in zip(rows, took_s, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise LoadTestError(f"hey printed other columns than expected: {error!r} in {outputs[0][:200]!r}") from error
    if not rows:
        raise LoadTestError(f"none of hey's {sent} requests was answered")
    answered = sum(200 <= code < 300 for code in codes)
    p50_s, p99_s = np.percentile(took_s, [50, 99], method="inverted_cdf").tolist()
    return Load(
        answered=answered,
        refused=codes.count(429),
        failed=sent - answered - codes.count(429),
        duration_s=max(ends_s),
        p50_ms=p50_s * 1e3,
        p99_ms=p99_s * 1e3,
    )
