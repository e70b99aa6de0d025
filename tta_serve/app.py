"""From a configuration to running Ray Serve applications: one for each model, and the front at `/`.

Ray reads its settings from the environment when it is imported, so `run` sets them first and imports it then.
"""

import contextlib
import importlib
import logging
import os
import random
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tta_serve import bodylimit
from tta_serve import config as configs
from tta_serve.config import Config, ModelSettings, Tokens, read_tokens
from tta_serve.errors import ConfigError, Unavailable
from tta_serve.runfolder import RunFolder, ServerStatus, Update

log = logging.getLogger(__name__)

FRONT = "front"
FLUSH_S = 15.0
PORTS = range(20_000, 32_000)  # for HAProxy's own; Ray's workers have those below
CPUS = 1024  # of Ray's books
POLL_S = 0.1
START_TIMEOUT_S = 1800.0  # a Fisher diagonal of a large model on a CPU takes many minutes


def build(config: Config, tokens: Tokens) -> list[tuple[str, str, Any]]:
    """The Ray Serve applications of a configuration: (name, route prefix, bound application).

    Raises:
        ConfigError: another package named `adapters` stands where ours should.
    """
    _refuse_foreign_adapters()
    from ray import serve

    from tta_serve.replica import FrontReplica, ModelReplica, app_name

    names = [model.name for model in config.models]

    def deployment(cls: type, name: str, ongoing: int, cpus: float, **replicas: Any) -> Any:
        return serve.deployment(serve.ingress()(cls)).options(
            name=name,
            max_surge_percent=100,  # the old replica answers until the new one does
            **replicas,
            # above what our own queue holds, so that a full server answers with our 429 and not with Ray's silence
            max_ongoing_requests=ongoing,
            graceful_shutdown_timeout_s=FLUSH_S,  # within which a replica gives the store what it does not have
            graceful_shutdown_wait_loop_s=0.1,
            max_constructor_retry_count=1,  # a constructor that fails will fail again
            ray_actor_options={"num_cpus": cpus},
        )

    store = config.store.absolute  # replicas run in folders of their own
    applications = [(FRONT, "/", deployment(FrontReplica, FRONT, 1000, 0, num_replicas=1).bind(names, tokens))]
    for model in config.models:
        ongoing = model.batching.queue_rows + model.batching.rows_max + 1000
        replica = deployment(ModelReplica, model.name, ongoing, 1, **_replicas(model))
        bound = replica.bind(model, config.limits, tokens, len(names), store)
        applications.append((app_name(model.name), f"/v2/models/{model.name}", bound))
    return applications


def _replicas(model: ModelSettings) -> dict[str, Any]:
    """How many, in Ray Serve's words."""
    if model.autoscaling is None:
        return {"num_replicas": model.replicas}
    return {"num_replicas": None, "autoscaling_config": model.autoscaling.model_dump()}


def run(
    config: Config, config_path: Path, progress: Callable[[str], None], on_ready: Callable[[ServerStatus], None]
) -> None:
    """Start the server, say when it is ready, and stay until SIGINT or SIGTERM.

    Args:
        config: validated.
        config_path: where it came from, for `status`.
        progress: told, in a few words, what is being waited for.
        on_ready: called once, when every model answers over HTTP.

    Raises:
        ConfigError, Unavailable: the server could not start; the message says why and what to do.
    """
    tokens = read_tokens(config.auth)
    check_port(config.http.host, config.http.port)
    folder = RunFolder(config.http.port)
    names = tuple(model.name for model in config.models)
    status = ServerStatus(config.http.port, config.http.host, os.getpid(), str(config_path), names, "starting")
    with folder.held():
        folder.write(status)
        _set_environment(config, folder.path)
        stopping = threading.Event()
        _stop_on_signals(stopping)
        clean = False
        try:
            _start(config, tokens, folder.path, progress, stopping)
            if not stopping.is_set():
                _wait_for_http(status.url, progress, stopping)
            if not stopping.is_set():
                status = status._replace(phase="ready")
                folder.write(status)
                on_ready(status)
            while not stopping.wait(POLL_S):
                if (update := folder.take_update(status)) is not None:
                    config, status = _update(config, status, update, folder, progress, stopping)
                    folder.write(status)
            clean = True
        except (ConfigError, Unavailable) as error:
            folder.write(status._replace(phase="failed", message=str(error)))
            raise
        finally:
            progress("stopping")
            _shut_down()
            if clean:
                folder.remove()


def _update(
    present: Config,
    status: ServerStatus,
    update: Update,
    folder: RunFolder,
    progress: Callable[[str], None],
    stopping: threading.Event,
) -> tuple[Config, ServerStatus]:
    """Go over to another configuration, replica by replica; where one does not start, back to the present one.

    Returns:
        The configuration that is served now, and what to say of it.
    """
    done = status._replace(update=update.id, message="")
    try:
        if update.folder != str(Path.cwd()):
            raise ConfigError(f"the server runs in {Path.cwd()}: paths would mean others; run `tta-serve up` there")
        config = configs.load(Path(update.config))
        check_update(present, config)
        applications = build(config, read_tokens(config.auth))
        before = build(present, read_tokens(present.auth))
    except ConfigError as error:
        return present, done._replace(message=str(error))
    folder.write(status._replace(phase="updating"))
    names = tuple(model.name for model in config.models)
    old = {model.name for model in present.models}
    try:
        _deploy(applications)
        _wait_for_replicas([name for name, _, _ in applications], folder.path, progress, stopping)
    except Exception as error:  # whatever Ray raises: the server goes on
        log.exception("the update to %s failed", update.config)
        _deploy(before)
        _remove(set(names) - old)
        return present, done._replace(message=f"{error} (the server goes on with {status.config})")
    _remove(old - set(names))
    return config, done._replace(config=update.config, models=names)


def check_update(present: Config, wanted: Config) -> None:
    """Raise ConfigError where a running server cannot go over to this configuration."""
    fixed = {
        "http.host": (present.http.host, wanted.http.host),
        "http.port": (present.http.port, wanted.http.port),
        "limits.body_bytes": (present.limits.body_bytes, wanted.limits.body_bytes),
        "store.path": (present.store.path, wanted.store.path),
    }
    if changed := [name for name, (old, new) in fixed.items() if old != new]:
        raise ConfigError(f"{', '.join(changed)}: fixed while a server runs; `tta-serve down`, and `up` again")


def check_port(host: str, port: int) -> None:
    """Raise ConfigError if something listens there already: HAProxy would say so late and at length."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} on {host} cannot be used ({error.strerror}); stop what listens there "
                f"(`tta-serve down --port {port}` if it is ours) or set http.port"
            ) from None


def _set_environment(config: Config, folder: Path) -> None:
    """Settings for Ray, Serve and HAProxy; what the user has set already stays."""
    proxy = folder / "h"
    defaults = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": bodylimit.HOOK,
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # 5 s kills a proxy that starts on a busy machine
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",  # three failures replace HAProxy; with 10 it was away for 30 s
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": "2",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(proxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(proxy / "a.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(proxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(proxy / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(proxy / "m.sock"),
        "RAY_AUTH_MODE": "token",  # Ray's own ports are open on every interface, and would run anybody's code
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray would hide GPUs from replicas that book none
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    # a second server on this machine must not meet the first one's ports
    for name in ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT", "FALLBACK_PROXY_GRPC_PORT"):
        defaults[f"RAY_SERVE_{name}"] = str(_free_port())
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ[bodylimit.BODY_BYTES_ENV] = str(int(config.limits.body_bytes))


def _free_port() -> int:
    """A port that nothing listens on now, below those that systems give to outgoing connections: one of them could have
    it a second later, when HAProxy starts.
    """
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise Unavailable(f"no port from {PORTS.start} to {PORTS.stop - 1} is free for HAProxy's statistics")


def _stop_on_signals(stopping: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())


def _start(
    config: Config, tokens: Tokens, folder: Path, progress: Callable[[str], None], stopping: threading.Event
) -> None:
    progress("importing Ray")
    applications = build(config, tokens)
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation

    progress("starting Ray")
    _send_ray_messages_to(folder / "ray-messages.log")
    try:
        ray.init(
            address="local",  # always a private one: nobody else's Ray is used, or stopped later
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            # replicas plan their own threads; Ray only has to let them start, old and new side by side
            num_cpus=CPUS,
            object_store_memory=100 * 2**20,  # nothing large travels through Ray
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder / "ray"),
            namespace="tta-serve",
        )
    except Exception as error:
        if stopping.is_set():
            return
        raise Unavailable(
            f"Ray did not start: {_last_line(str(error))} (its logs are below {folder / 'ray'})"
        ) from error
    _stop_on_signals(stopping)  # ray.init puts its own in their place
    progress("starting HAProxy")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    http = HTTPOptions(host=config.http.host, port=config.http.port, request_timeout_s=None, keep_alive_timeout_s=75)
    try:
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http, logging_config=_quiet())
    except Exception as error:
        if stopping.is_set():
            return
        raise Unavailable(f"HAProxy did not start on port {config.http.port}: {_last_line(str(error))}") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    _deploy(applications)
    _wait_for_replicas([name for name, _, _ in applications], folder, progress, stopping)


def _quiet() -> Any:
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(enable_access_log=False, log_level="WARNING")


def _deploy(applications: list[tuple[str, str, Any]]) -> None:
    """Tell Ray Serve what shall run; it replaces what differs."""
    from ray import serve
    from ray.serve.api import RunTarget

    serve.run_many(
        [
            RunTarget(target=app, name=name, route_prefix=prefix, logging_config=_quiet())
            for name, prefix, app in applications
        ],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def _remove(models: set[str]) -> None:
    from ray import serve

    from tta_serve.replica import app_name

    for model in models:
        serve.delete(app_name(model))


def _wait_for_replicas(
    names: list[str], folder: Path, progress: Callable[[str], None], stopping: threading.Event
) -> None:
    from ray import serve

    until_s = time.monotonic() + START_TIMEOUT_S
    while not stopping.is_set():
        applications = serve.status().applications
        waiting = [name.removeprefix("model-") for name in names if applications[name].status != "RUNNING"]
        if not waiting:
            return
        for name in names:
            if applications[name].status in ("DEPLOY_FAILED", "UNHEALTHY"):
                said = [deployment.message for deployment in applications[name].deployments.values()]
                raise ConfigError(_reason("\n".join(said) or applications[name].message, folder))
        if time.monotonic() > until_s:
            raise Unavailable(
                f"{', '.join(waiting)} did not start in {START_TIMEOUT_S:g} s; the logs are in {folder / 'ray'}"
            )
        progress(f"loading {', '.join(waiting)}")
        stopping.wait(0.1)


def _wait_for_http(url: str, progress: Callable[[str], None], stopping: threading.Event) -> None:
    """A replica that runs is not yet one that HAProxy knows: ask over HTTP."""
    progress("waiting for the first answer")
    until_s = time.monotonic() + START_TIMEOUT_S
    while not stopping.is_set():
        try:
            if httpx.get(f"{url}/v2/health/ready", timeout=5).status_code == httpx.codes.OK:
                models = httpx.get(f"{url}/v2/models", timeout=5).json()["models"]
                if all(httpx.get(url + each["url"] + "/ready", timeout=5).is_success for each in models):
                    return
        except (httpx.HTTPError, ValueError):
            pass  # not yet
        if time.monotonic() > until_s:
            raise Unavailable(f"the replicas run, and {url} does not answer after {START_TIMEOUT_S:g} s")
        stopping.wait(0.1)


def _shut_down() -> None:
    import ray
    from ray import serve

    if ray.is_initialized():
        serve.shutdown()
        ray.shutdown()


def _reason(message: str, folder: Path) -> str:
    """What a failed replica's traceback says in the end: our own error's words, or its last line."""
    _, found, ours = message.rpartition("tta_serve.errors.ConfigError: ")
    if found:
        return ours.strip()
    return f"{_last_line(message)} (the replica's log is below {folder / 'ray'})"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no reason given"


def _send_ray_messages_to(path: Path) -> None:
    """Ray prints some messages of its daemons whatever it is told; they belong in a file."""
    from ray._private import worker

    def write(message: dict[str, Any], *_: Any, **__: Any) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in message.get("lines", ()))

    worker.print_to_stdstream = write


def _refuse_foreign_adapters() -> None:
    package = importlib.import_module("adapters")
    if not hasattr(package, "EATA"):
        raise ConfigError(
            f"the package `adapters` at {getattr(package, '__file__', '?')} is not tta-serve's but an unrelated one "
            "of the same name; run `pip uninstall adapters`, then install tta-serve again"
        )
