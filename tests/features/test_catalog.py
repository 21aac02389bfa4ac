"""Fingerprints: one of the catalogue, and one of each feature that what was trained on it can be held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from features import CATALOG, CATEGORIES, catalog
from features.catalog import Aggregate, Feature, Source, fingerprint
from server.service import catalog_message

HABITS = {Aggregate.HABIT_MEAN, Aggregate.HABIT_SHARE}


def of_merchants(feature: Feature) -> bool:
    return feature.source is Source.MERCHANT


def of_ledgers(feature: Feature) -> bool:
    return feature.source in (Source.LEDGER, Source.LEDGER_AND_REQUEST)


@pytest.mark.parametrize(
    ("constant", "value", "depends"),
    [
        ("NIGHT_BEGINS_HOUR", 20, lambda f: f.name == "is_night"),
        ("NIGHT_ENDS_HOUR", 7, lambda f: f.name == "is_night"),
        ("LABEL_DELAY_DAYS", 8, lambda f: f.name.startswith("merchant_risk")),
        ("RISK_PRIOR_TXNS", 21, lambda f: f.name.startswith("merchant_risk")),
        ("DAY_DELAY_MS", 1, lambda f: of_merchants(f) or f.aggregate in HABITS),
        ("RETENTION_MS", 1, of_ledgers),
        ("CATEGORIES", (*CATEGORIES, "another"), lambda f: "category" in f.needs),
    ],
)
def test_a_constant_changes_the_fingerprints_of_what_depends_on_it_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
    constant: str,
    value: object,
    depends: Callable[[Feature], bool],
) -> None:
    before = {feature: feature.fingerprint for feature in CATALOG}
    monkeypatch.setattr(catalog, constant, value)
    changed = {feature.name for feature in CATALOG if feature.fingerprint != before[feature]}
    assert changed == {feature.name for feature in CATALOG if depends(feature)}
    assert changed


def test_meaning_changes_a_features_fingerprint_and_wording_does_not() -> None:
    feature = next(f for f in CATALOG if f.name == "txn_count_last_10_min")
    assert replace(feature, description="In other words.").fingerprint == feature.fingerprint
    for changed in (
        replace(feature, name="another"),
        replace(feature, version=feature.version + 1),
        replace(feature, unit="ratio"),
        replace(feature, window_ms=feature.window_ms + 1),
        replace(feature, delay_ms=1),
        replace(feature, aggregate=Aggregate.SUM),
        replace(feature, source=Source.PROFILE),
        replace(feature, needs=("amount",)),
    ):
        assert changed.fingerprint != feature.fingerprint, changed


def test_one_more_feature_changes_the_catalogues_fingerprint_and_no_features(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = [feature.fingerprint for feature in CATALOG]
    more = (*CATALOG, replace(CATALOG[0], name="one_more"))
    assert fingerprint(more, CATEGORIES) != fingerprint(CATALOG, CATEGORIES)
    monkeypatch.setattr(catalog, "CATALOG", more)
    assert [feature.fingerprint for feature in catalog.CATALOG][:-1] == before


def test_the_catalogue_that_is_served_has_them() -> None:
    served = {feature.name: feature.fingerprint for feature in catalog_message().features}
    assert served == {feature.name: feature.fingerprint for feature in CATALOG}
    assert len(set(served.values())) == len(CATALOG)
    assert all(len(found) == 64 for found in served.values())
