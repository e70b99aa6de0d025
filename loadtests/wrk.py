"""The load generator: `wrk` (Will Glozer, github.com/wg/wrk; Debian package `wrk`), driven by a generated Lua script.

Each connection sends its next request when the answer to the last one has come, so it measures the throughput that N
clients get who wait for their answers, and the latency that they see at that load.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from loadtests.client import Encoded
from loadtests.errors import LoadTestError, MissingTool

MARK = "loadtest-figures "  # begins the line that holds the figures
TIMEOUT_S = 10  # of one request

SCRIPT = """\
local bodies = {%(bodies)s}
local requests, turn, threads = {}, 0, {}
answered, refused, failed = 0, 0, 0  -- global: the first thread reads them from the others

function setup(thread)
  thread:set("number", #threads)
  threads[#threads + 1] = thread
end

function init()
  local headers = {%(headers)s}
  for i, body in ipairs(bodies) do requests[i] = wrk.format("POST", nil, headers, body) end
  turn = number
end

function request()
  turn = turn %% #requests + 1
  return requests[turn]
end

function response(status)
  if status >= 200 and status < 300 then answered = answered + 1
  elseif status == 429 then refused = refused + 1
  else failed = failed + 1 end
end

function done(summary, latency)
  local answered, refused, failed = 0, 0, 0
  for _, thread in ipairs(threads) do
    answered = answered + thread:get("answered")
    refused = refused + thread:get("refused")
    failed = failed + thread:get("failed")
  end
  local e = summary.errors
  failed = failed + e.connect + e.read + e.write + e.timeout
  io.write(string.format('\\n%(mark)s{"answered": %%d, "refused": %%d, "failed": %%d, "duration_us": %%d, ' ..
    '"p50_us": %%d, "p99_us": %%d}\\n', answered, refused, failed, summary.duration,
    latency:percentile(50), latency:percentile(99)))
end
"""


class Load(NamedTuple):
    """What one interval gave."""

    answered: int  # requests answered with 2xx
    refused: int  # with 429
    failed: int  # with any other status, or not at all: connection refused, broken or timed out
    duration_s: float
    p50_ms: float  # of all answers
    p99_ms: float

    @property
    def rps(self) -> float:
        """Requests answered with 2xx, per second."""
        return self.answered / self.duration_s


def check_installed() -> str:
    """The program's path.

    Raises:
        MissingTool: it is not installed.
    """
    program = shutil.which("wrk")
    if program is None:
        raise MissingTool("the load generator wrk is not installed: apt install wrk (Debian package `wrk`)")
    return program


def script(requests: Sequence[Encoded]) -> str:
    """A Lua script that posts these requests in turn. All must have the same headers.

    Raises:
        ValueError: they differ, or there is none.
    """
    if not requests or any(request.headers != requests[0].headers for request in requests):
        raise ValueError("the script needs one request or more, all with the same headers")
    bodies = ", ".join(_literal(request.body) for request in requests)
    named = requests[0].headers.items()
    headers = ", ".join(f"[{_literal(name.encode())}] = {_literal(value.encode())}" for name, value in named)
    return SCRIPT % {"bodies": bodies, "headers": headers, "mark": MARK}


def _literal(raw: bytes) -> str:
    """A Lua string of any bytes."""
    return '"' + "".join(f"\\{byte:03d}" for byte in raw) + '"'


def load(url: str, requests: Sequence[Encoded], connections: int, seconds: int) -> Load:
    """Post the requests in turn over this many connections.

    Args:
        url: of the route.
        requests: with the same headers.
        connections: each with one request on the way at a time.
        seconds: how long.

    Raises:
        MissingTool: wrk is not installed.
        LoadTestError: it failed.
    """
    program = check_installed()
    threads = min(connections, max(1, (os.cpu_count() or 1) // 4))
    with tempfile.TemporaryDirectory(prefix="tta-loadtest-") as folder:
        file = Path(folder) / "post.lua"
        file.write_text(script(requests))
        command = [program, f"-t{threads}", f"-c{connections}", f"-d{seconds}s", f"--timeout={TIMEOUT_S}s"]
        try:
            done = subprocess.run(
                [*command, "-s", str(file), url],
                capture_output=True,
                text=True,
                check=False,
                timeout=seconds + TIMEOUT_S + 20,
            )
        except subprocess.TimeoutExpired:
            raise LoadTestError(f"wrk did not end {TIMEOUT_S + 20} s after its {seconds} s") from None
    if done.returncode != 0:
        raise LoadTestError(f"wrk ended with exit code {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return parse(done.stdout)


def parse(output: str) -> Load:
    """The figures from what wrk printed.

    >>> times = '"duration_us": 2000000, "p50_us": 900, "p99_us": 1500'
    >>> parse(MARK + '{"answered": 10, "refused": 0, "failed": 0, %s}' % times).rps
    5.0
    """
    lines = [line.removeprefix(MARK) for line in output.splitlines() if line.startswith(MARK)]
    if not lines:
        raise LoadTestError(f"wrk printed no figures:\n{output.strip()[-500:]}")
    told = json.loads(lines[-1])
    return Load(
        answered=told["answered"],
        refused=told["refused"],
        failed=told["failed"],
        duration_s=told["duration_us"] / 1e6,
        p50_ms=told["p50_us"] / 1e3,
        p99_ms=told["p99_us"] / 1e3,
    )
