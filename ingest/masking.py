"""Card numbers in texts: found, and masked."""

from __future__ import annotations

import re

_CARD_DIGITS_MIN = 8
_LONG_NUMBER = re.compile(r"(?<![\w.])\d{8,19}(?![\w])")
_ANY_DIGITS = re.compile(r"\d(?:[ .-]?\d){7,}")
CARD_DIGITS_MIN, CARD_DIGITS_MAX = 13, 19
_DIGIT_GROUPS = re.compile(r"\d+(?:[ -]\d+)*")
_PAYMENT_CARD = re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)")
"""13 to 19 digits, as cards are printed."""


def masked(text: str) -> str:
    """The text with every number of 8 to 19 digits cut to its last four, and card numbers as they are
    printed, in groups."""
    text = _PAYMENT_CARD.sub(lambda m: masked_card(m[0]), text)
    return _LONG_NUMBER.sub(lambda m: "*" * (len(m[0]) - 4) + m[0][-4:], text)


def masked_card(text: str) -> str:
    """A card column's text, however mangled, with all digits but the last four blotted out."""
    digits = sum(character.isdigit() for character in text)
    if digits < _CARD_DIGITS_MIN:
        return text
    hidden = iter(range(digits - 4))
    return "".join(
        "*" if character.isdigit() and next(hidden, None) is not None else character
        for character in text
    )


def masked_digits(text: str) -> str:
    """A text without columns: whatever could be a card number in any spelling is cut."""
    return _ANY_DIGITS.sub(lambda m: masked_card(m[0]), text)


def has_card_number(text: str) -> bool:
    """Whether some groups of digits in a row, spaces and dashes between them, are 13 to 19 digits together
    that pass as a card number by their check digit (ISO/IEC 7812-1, Luhn). What stands beside it, such as
    the day on which the card expires, does not hide it."""
    return any(_has_card(run[0]) for run in _DIGIT_GROUPS.finditer(text))


def _has_card(run: str) -> bool:
    groups = re.split("[ -]", run)
    for begin in range(len(groups)):
        digits = ""
        for group in groups[begin:]:
            digits += group
            if len(digits) > CARD_DIGITS_MAX:
                break
            if len(digits) >= CARD_DIGITS_MIN and _passes_luhn(digits):
                return True
    return False


def _passes_luhn(text: str) -> bool:
    digits = [int(character) for character in text if character.isdigit()]
    doubled = (2 * digit for digit in digits[-2::-2])
    total = sum(digits[-1::-2]) + sum(digit - 9 if digit > 9 else digit for digit in doubled)
    return total % 10 == 0 and any(digits)
