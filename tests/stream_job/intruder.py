"""Another user of the machine, who tries every door of a running stack. Prints a JSON list of what
opened: `python -m tests.stream_job.intruder UID` with ports and Unix sockets as JSON on stdin.

Whatever speaks at a port, each attack is tried on it: which door is which is not to matter.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

import grpc
import psycopg
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

TIMEOUT_S = 2.0
ANSWER_S = 15.0
"""Of a call: a server that refuses it slowly has not let it in."""
HOST = "127.0.0.1"
PROVISION = "/org.apache.beam.model.fn_execution.v1.ProvisionService/GetProvisionInfo"
CONTROL = "/org.apache.beam.model.fn_execution.v1.BeamFnControl/Control"
REST_PATHS = ("/jobs/overview", "/config", "/jobmanager/config", "/jars", "/taskmanagers")


def says(port: int, text: bytes) -> bytes:
    """What comes back first."""
    with socket.create_connection((HOST, port), TIMEOUT_S) as connection:
        connection.sendall(text)
        return connection.recv(4096)


def runs_java(port: int) -> str | None:
    """Py4J: a method of the JVM. An answer of one begins with !y."""
    answer = says(port, b"c\nz:java.lang.System\ngetProperty\nsuser.name\ne\n")
    return f"Py4J: {answer!r}" if answer.startswith(b"!y") else None


def calls_python(port: int) -> str | None:
    """Py4J the other way: PyFlink's own object that imports any module of Python."""
    answer = says(port, b"c\np0\ngetPythonFunction\nsos\nsgetcwd\ne\n")
    is_asked_for_a_token = b"Authentication error" in answer
    opens = answer.startswith(b"!") and not is_asked_for_a_token
    return f"Py4J of Python: {answer!r}" if opens else None


def asks_flink(port: int) -> str | None:
    """Flink's REST, which takes jars and cancels jobs."""
    anyone = ssl._create_unverified_context()
    for scheme in ("http", "https"):
        with suppress(OSError, HTTPException):  # one way of asking may fail, and the other not
            for path in REST_PATHS:
                url = f"{scheme}://{HOST}:{port}{path}"
                with urllib.request.urlopen(url, timeout=TIMEOUT_S, context=anyone) as response:
                    body = response.read(200)
                    if not body.startswith(b"# HELP"):  # what Prometheus reads is for everyone
                        return f"{url}: {body!r}"
    return None


def uploads(port: int) -> str | None:
    """Flink's REST: a jar, and the end of a job."""
    for method, path in (("POST", "/jars/upload"), ("PATCH", "/jobs/" + "0" * 32)):
        request = urllib.request.Request(f"http://{HOST}:{port}{path}", b"x", method=method)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                return f"{method} {path}: {response.status}"
        except HTTPError as error:
            if error.read(6) == b'{"erro':  # it is Flink that answers, whatever it says
                return f"{method} {path}: {error.code}"
    return None


def fetches_blobs(port: int) -> str | None:
    """Flink's blob server: it says what it has not only to those whom it talks to."""
    answer = says(port, b"\x01\x00" + bytes(16) + b"\x00" + bytes(36))
    # TLS ends with an alert (21); that there is no such blob (1) is the server's own answer.
    return f"blob server: {answer!r}" if answer[:1] == b"\x01" else None


def is_a_worker(target: str) -> str | None:
    """Beam: what a worker is told, and the events that it gets."""
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        for method in (PROVISION, CONTROL):
            call: Any = channel.stream_stream(method)
            answers = call(iter([b""]), timeout=ANSWER_S, metadata=(("worker_id", "1-1"),))
            try:
                return f"Beam: {next(answers)!r}"
            except grpc.RpcError as error:
                answered = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE)
                if error.code() not in answered:
                    return f"Beam's {method}: {error.code()}"
            except StopIteration:
                return f"Beam's {method} ended"
    return None


def reads_topics(port: int) -> str | None:
    """Kafka without a password, and with one that is guessed."""
    logins: tuple[dict[str, Any], ...] = (
        {"security.protocol": "PLAINTEXT"},
        {
            "security.protocol": "SASL_PLAINTEXT",
            "sasl.mechanism": "PLAIN",
            "sasl.username": "tally",
            "sasl.password": "tally",
        },
    )
    for login in logins:
        servers: dict[str, Any] = {"bootstrap.servers": f"{HOST}:{port}", "log_level": 0}
        with suppress(KafkaException):
            topics = AdminClient(servers | login).list_topics(timeout=TIMEOUT_S / 2).topics
            return f"Kafka: {sorted(topics)}"
    return None


def reads_stores(port: int) -> str | None:
    """Redis and Postgres."""
    if says(port, b"PING\r\n").startswith(b"+PONG"):
        return "Redis"
    with suppress(psycopg.OperationalError):
        psycopg.connect(host=HOST, port=port, user="postgres", connect_timeout=2).close()
        return "Postgres"
    return None


ATTACKS: tuple[Callable[[int], str | None], ...] = (
    *(runs_java, calls_python, asks_flink, uploads, fetches_blobs, reads_topics, reads_stores),
    lambda port: is_a_worker(f"{HOST}:{port}"),
)


def opened(port: int) -> list[str]:
    """What an attack made of a port."""
    found = []
    for attack in ATTACKS:
        with suppress(OSError, HTTPException):
            outcome = attack(port)
            if outcome is not None:
                found.append(f"{port}: {outcome}")
    return found


def connected(path: str) -> list[str]:
    """Whether a Unix socket takes connections."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(path)
        return [f"{path}: it takes connections"]
    return []


if __name__ == "__main__":
    doors = json.load(sys.stdin)
    uid = int(sys.argv[1])
    with socket.create_server((HOST, 0)) as server:
        closed = server.getsockname()[1]
    opened(closed)  # reads every module, as long as it may
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    with ThreadPoolExecutor(len(doors["ports"])) as pool:
        tried = [*pool.map(opened, doors["ports"]), *map(connected, doors["sockets"])]
    print(json.dumps([one for found in tried for one in found]))
