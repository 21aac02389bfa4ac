"""Makes docs/features.md from the catalogue: `make gen`; `make check` compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from features.catalog import (
    CATALOG,
    CATALOG_FINGERPRINT,
    CATEGORIES,
    DAY_DELAY_MS,
    DAY_MS,
    HOUR_MS,
    RETENTION_MS,
    RISK_PRIOR_TXNS,
    Aggregate,
    Feature,
)
from features.sweep import OF_HABITS, OF_MERCHANTS

PAGE = Path(__file__).parent / "features.md"

FORMULAS = {
    Aggregate.COUNT: "n",
    Aggregate.SUM: "S / 100",
    Aggregate.MEAN: "S / (100 n)",
    Aggregate.STD: "sqrt(n Q − S²) / (100 n)",
    Aggregate.MAX: "max(x) / 100",
    Aggregate.DISTINCT_MERCHANTS: "number of different merchants",
    Aggregate.SAME_CATEGORY_COUNT: "number of x in the payment's category",
    Aggregate.ZSCORE: "(n a − S) / sqrt(n Q − S²)",
    Aggregate.SECONDS_SINCE_LAST: "t − time of the last transaction before t",
    Aggregate.SPEED: "great circle from the last merchant / time since",
    Aggregate.DISTANCE: "great circle from home to the merchant",
    Aggregate.AGE: "whole days since birth / 365.2425",
    Aggregate.HABIT_MEAN: "S / (100 n) of the payment's category",
    Aggregate.HABIT_SHARE: "n of the payment's category / n",
    Aggregate.MERCHANT_COUNT: "n",
    Aggregate.MERCHANT_MEAN: "S / (100 n)",
    Aggregate.MERCHANT_RISK: "(f N + K F) / ((n + K) N)",
}


def window(feature: Feature) -> str:
    """The window in words."""
    if not feature.window_ms:
        return ""
    minutes = feature.window_ms // 60_000
    if feature.aggregate in OF_HABITS | OF_MERCHANTS:
        days = (feature.window_ms + feature.delay_ms) // DAY_MS
        return f"[D − {days} d, D − {feature.delay_ms // DAY_MS} d)".replace(" − 0 d)", ")")
    if minutes % 1_440 == 0:
        return f"{minutes // 1_440} d"
    return f"{minutes // 60} h" if minutes % 60 == 0 else f"{minutes} min"


def page() -> str:
    """The whole page."""
    rows = [
        f"| `{f.name}` | {f.description} | {f.unit} | {window(f)} | {f.source} | "
        f"{', '.join(f'`{name}`' for name in f.needs)} | {FORMULAS.get(f.aggregate, '')} |"
        for f in CATALOG
    ]
    codes = ", ".join(f"{code} `{name}`" for code, name in enumerate(CATEGORIES, start=1))
    return "\n".join(
        [
            "# Features",
            "",
            "Made from `features/catalog.py` by `make gen`; `make check` fails when it is not.",
            "",
            "A window of length w at the instant t is [t − w, t): strictly before t. n is the "
            "number of the card's transactions in it, x their amounts in minor units, S = Σx, "
            "Q = Σx², a the payment's amount. Values are float64, amounts in currency units, "
            f"times UTC. A ledger keeps a card's transactions for {RETENTION_MS // 86_400_000} "
            "days behind its newest.",
            "",
            "Daily features are of whole days in UTC. D is the beginning of the last day that began "
            f"{DAY_DELAY_MS // HOUR_MS} hours before t or earlier: until then those of the day before "
            "are valid. Of a merchant, n are the payments of all cards at it, f those that were known "
            "before D to be fraud, N and F the same of all merchants together, and K is "
            f"{RISK_PRIOR_TXNS}. The batch job keeps what they are computed from; of a day that it has "
            "not come to, the status is NOT_COMPUTED.",
            "",
            "| name | what it is | unit | window | computed from | needs | formula |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"The codes of `category`: {codes}.",
            "",
            f"Fingerprint of this catalogue: `{CATALOG_FINGERPRINT}`",
            "",
        ]
    )


def main() -> int:
    """Writes the page, or with --check says whether it is what would be written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.stderr.write(f"{PAGE} is not what the catalogue says: run `make gen`\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
