"""The Fraud Detection Handbook's simulation, read as if it were of the Kaggle format.

Its columns are numbers. Customers become card numbers of twelve digits, terminals merchants; ids get a
prefix, lest another file's be the same. The file says nothing of categories, places or card holders.
Format: Reproducible Machine Learning for Credit Card Fraud Detection - Practical Handbook, "Transaction
data simulator".
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

COLUMNS = {
    "TRANSACTION_ID": "trans_num",
    "TX_DATETIME": "trans_date_trans_time",
    "CUSTOMER_ID": "cc_num",
    "TERMINAL_ID": "merchant",
    "TX_AMOUNT": "amt",
    "TX_FRAUD": "is_fraud",
}
"""What is read, by the Kaggle format's names."""

CARD_DIGITS = 12


def is_handbook(names: list[str]) -> bool:
    """Whether a file with these columns is of this format."""
    return COLUMNS.keys() <= set(names)


def as_kaggle(texts: pa.Table) -> pa.Table:
    """Rows of this format, as text, under the Kaggle format's names."""
    table = texts.rename_columns([COLUMNS[name] for name in texts.column_names])
    made = {
        "trans_num": pc.binary_join_element_wise("handbook ", table["trans_num"], ""),
        "cc_num": pc.utf8_lpad(table["cc_num"], CARD_DIGITS, "0"),
        "merchant": pc.binary_join_element_wise("terminal ", table["merchant"], ""),
    }
    for name, column in made.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table
