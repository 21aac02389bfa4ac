"""Clients that others wrote, in Go, ask the server with nothing but its address: by reflection."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.batch_job.test_load import new_card
from tests.conftest import ROOT

CLIENTS = ROOT / "build" / "go"
METHOD = "tally.v1.FeatureService.GetOnlineFeatures"


def run(name: str, *arguments: str, status: int = 0) -> str:
    """What a client prints; skips where it was not built."""
    client = CLIENTS / name
    if not client.exists():
        pytest.skip(f"no build/go/{name}: `make go-clients` builds it where there is Go")
    done = subprocess.run(
        [client, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def request(card: str) -> str:
    row = {"card": card, "event_time_ms": 1_709_208_000_000, "amount": 12.5}
    return json.dumps({"rows": [row], "features": ["amt", "txn_count_last_1_hour"]})


def test_grpcurl_lists_and_describes_services_methods_and_messages(stack):
    listed = run("grpcurl", "-plaintext", stack.address, "list").split()
    assert {"tally.v1.FeatureService", "tally.v1.AdminService"} <= set(listed)
    methods = run("grpcurl", "-plaintext", stack.address, "list", "tally.v1.FeatureService")
    for method in (*methods.split(), "grpc.health.v1.Health.Watch"):
        described = run("grpcurl", "-plaintext", stack.address, "describe", method)
        assert described.startswith(f"{method} is a method:")
    for symbol in (
        "tally.v1.GetOnlineFeaturesRequest",
        "tally.v1.FeatureRow.card",
        "tally.v1.FeatureStatus",
        "grpc.reflection.v1.ServerReflection",
    ):
        described = run("grpcurl", "-plaintext", stack.address, "describe", symbol)
        assert described.startswith(symbol)


def test_grpcurl_asks_for_features_and_is_told_what_is_wrong(stack):
    call = ("-plaintext", "-d")
    answer = json.loads(
        run("grpcurl", *call, request(new_card()), stack.address, METHOD.replace(".Get", "/Get"))
    )
    assert answer["features"] == ["amt", "txn_count_last_1_hour"]
    assert answer["values"] == [12.5, "NaN"]
    told = run(
        *(
            "grpcurl",
            *call,
            request("4"),
            stack.address,
            "tally.v1.FeatureService/GetOnlineFeatures",
        ),
        status=64 + 3,  # INVALID_ARGUMENT
    )
    assert "rows[0].card" in told


def test_grpcurl_watches_health_until_its_time_is_over(stack):
    told = run(
        *("grpcurl", "-plaintext", "-max-time", "1", stack.address, "grpc.health.v1.Health/Watch"),
        status=64 + 4,  # DEADLINE_EXCEEDED, of the client's own
    )
    assert '"status": "SERVING"' in told


def test_ghz_loads_a_method_that_it_knows_by_name_alone(stack):
    report = json.loads(
        run(
            *("ghz", "--insecure", "--call", METHOD, "-d", request(new_card())),
            *("-n", "500", "-c", "20", "--format", "json", stack.address),
        )
    )
    assert report["statusCodeDistribution"] == {"OK": 500}
