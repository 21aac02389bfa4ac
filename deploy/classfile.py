"""Java's class files, as far as it takes to give one method the body of another (JVMS, chapter 4)."""

from __future__ import annotations

from dataclasses import dataclass

MAGIC = b"\xca\xfe\xba\xbe"
_UTF8 = 1
_CONSTANT_BYTES = {
    **dict.fromkeys((3, 4, 9, 10, 11, 12, 17, 18), 4),
    **dict.fromkeys((7, 8, 16, 19, 20), 2),
    **dict.fromkeys((5, 6), 8),
    15: 3,
}
"""Of each kind of constant but text, its length behind the tag."""
_TWO_PLACES = (5, 6)
"""Constants of eight bytes count twice."""


class ClassFileError(ValueError):
    """This is no class file, or another than was expected."""


@dataclass(frozen=True, slots=True)
class _Method:
    name: str
    descriptor: str
    body: slice
    """Where its attributes are: its code among them."""


def with_body_of(content: bytes, method: str, donor: str) -> bytes:
    """A class in which `method` does what `donor` does.

    Code names what it uses by its number in the class's table of constants, hence it means the same in
    every method of that class.

    Args:
        content: the class file.
        method: the name of a method; there is one.
        donor: of another, which takes and returns the same.

    Raises:
        ClassFileError: this is no class file, or there are no such methods.
    """
    try:
        methods = [m for m in _methods(content) if m.name in (method, donor)]
    except (IndexError, KeyError):
        raise ClassFileError("it ends too early, or names what is not there") from None
    found = {m.name: m for m in methods}
    if len(methods) != 2 or len(found) != 2 or len({m.descriptor for m in methods}) != 1:
        raise ClassFileError(f"{method} and {donor} are not two methods of the same kind")
    old, new = found[method].body, found[donor].body
    return content[: old.start] + content[new] + content[old.stop :]


def _methods(content: bytes) -> list[_Method]:
    if content[:4] != MAGIC:
        raise ClassFileError("it does not begin as a class file")
    texts, at = _texts(content)
    at += 6  # access flags, this class, its superclass
    at += 2 + 2 * _u2(content, at)  # interfaces
    methods: list[_Method] = []
    for kind in ("fields", "methods"):
        count, at = _u2(content, at), at + 2
        for _ in range(count):
            name, descriptor = texts[_u2(content, at + 2)], texts[_u2(content, at + 4)]
            end = _behind_attributes(content, at + 6)
            if kind == "methods":
                methods.append(_Method(name, descriptor, slice(at + 6, end)))
            at = end
    return methods


def _texts(content: bytes) -> tuple[dict[int, str], int]:
    """The constants that are text, by their numbers, and where the table ends."""
    texts: dict[int, str] = {}
    count, at, number = _u2(content, 8), 10, 1
    while number < count:
        tag = content[at]
        if tag == _UTF8:
            length = _u2(content, at + 1)
            texts[number] = content[at + 3 : at + 3 + length].decode(errors="replace")
            at += 3 + length
        elif tag in _CONSTANT_BYTES:
            at += 1 + _CONSTANT_BYTES[tag]
        else:
            raise ClassFileError(f"a constant of the unknown kind {tag}")
        number += 2 if tag in _TWO_PLACES else 1
    return texts, at


def _behind_attributes(content: bytes, at: int) -> int:
    count, at = _u2(content, at), at + 2
    for _ in range(count):
        at += 6 + int.from_bytes(content[at + 2 : at + 6], "big")
    return at


def _u2(content: bytes, at: int) -> int:
    return int.from_bytes(content[at : at + 2], "big")
