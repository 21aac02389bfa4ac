"""The broker's storage."""

from __future__ import annotations

import uuid

from deploy.kafka import cluster_id


def test_an_id_that_looks_like_an_option_is_not_used(monkeypatch):
    drawn = iter([uuid.UUID(int=0xF8 << 120), uuid.UUID(int=0xFB << 120), uuid.UUID(int=1)])
    monkeypatch.setattr(uuid, "uuid4", lambda: next(drawn))
    assert cluster_id() == "AAAAAAAAAAAAAAAAAAAAAQ"
