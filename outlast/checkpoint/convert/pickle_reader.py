"""Reads a pickle without running anything: its operations are carried out here, on plain values and inert records.

Time and memory stay in proportion to the pickle's bytes. Python's own unpickler bounds neither: nine bytes make it
reserve 4 GB for a memo, and a tuple that holds the one before twice, sixty times over, is never hashed to its end.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from outlast.errors import CheckpointError, CorruptCheckpoint

_INTEGER_BYTES = 255
_NAME_BYTES = 1024
"""Of the module of a global, or its name, at most."""
_WIDTH = 256
"""Values in a tuple with the tuples in it, at most: what hashing it may cost."""
_COPIED = 10_000_000
"""Items that makers may copy from one container to another, at most."""
_KEY_BITS = 64
"""Of an integer as a key: larger ones can be chosen so that all have one hash."""
_NEWEST_PROTOCOL = 5
_CONSTANTS = {ord("N"): None, 0x88: True, 0x89: False}
_EMPTY: dict[int, Callable[[], Any]] = {ord(")"): tuple, ord("]"): list, ord("}"): dict, 0x8F: set}
_NUMBERS = {ord(op): struct.Struct(kind) for op, kind in (("J", "<i"), ("K", "<B"), ("M", "<H"), ("G", ">d"))}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_GETS = {ord("h"): struct.Struct("<B"), ord("j"): struct.Struct("<I")}
_PUTS = {ord("q"): struct.Struct("<B"), ord("r"): struct.Struct("<I")}


def _text(data: bytes) -> str:
    return str(data, "utf-8", "surrogatepass")


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


_SIZED: dict[int, tuple[struct.Struct, Callable[[bytes], Any]]] = {
    ord("X"): (struct.Struct("<I"), _text),
    0x8C: (struct.Struct("<B"), _text),
    0x8D: (struct.Struct("<Q"), _text),
    ord("B"): (struct.Struct("<I"), bytes),
    ord("C"): (struct.Struct("<B"), bytes),
    0x8E: (struct.Struct("<Q"), bytes),
    ord("U"): (struct.Struct("<B"), bytes),
    0x8A: (struct.Struct("<B"), _integer),
}


class Record:
    """An object in a pickle: the name of its class or function, what that was called with, and the state it was given.

    Nothing of the name is looked up.
    """

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, args: tuple[Any, ...] = ()) -> None:
        self.kind = kind
        self.args = args
        self.state: Any = None


class Mapping(dict[Any, Any]):
    """A dictionary of a class of its own, with the state it was given."""

    state: Any = None


class Maker:
    """What a pickle may call.

    Args:
        name: of the class or function.
        make: what stands for the call; gets the arguments. Without it, a :class:`Record` of the name.
    """

    def __init__(self, name: str, make: Callable[..., Any] | None = None) -> None:
        self.name = name
        self._make = make

    def __call__(self, args: tuple[Any, ...]) -> Any:
        """What stands for the call."""
        return Record(self.name, args) if self._make is None else self._make(*args)


class PickleReader:
    """One pickle.

    Args:
        data: bytes that begin with it, or have it at ``position``.
        what: its name, for errors.
        find: what stands for a global, by module and name: a value, or a :class:`Maker`; raises for what is refused.
        persistent: what stands for a persistent id; None: there may be none.
        position: of its first byte.

    Attributes:
        position: of the byte after what was read.
    """

    def __init__(
        self,
        data: bytes,
        what: str,
        find: Callable[[str, str], Any],
        persistent: Callable[[Any], Any] | None = None,
        position: int = 0,
    ) -> None:
        self._data = memoryview(data)
        self._what = what
        self._find = find
        self._persistent = persistent
        self.position = position
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._nested: dict[int, tuple[tuple[Any, ...], int]] = {}
        """Tuples with tuples in them, and how many values those have in all; by id, which theirs alone are as long as
        they are here."""
        self._copied = 0

    def read(self) -> Any:
        """The value.

        Raises:
            CorruptCheckpoint: it is no pickle, or cut short, or costs more than its size allows; says where.
            CheckpointError: raised by ``find`` or a maker.
        """
        began = self.position
        try:
            while (op := self._byte()) != ord("."):
                self._do(op)
            return self._stack.pop()
        except CheckpointError:
            raise
        except (LookupError, OverflowError, TypeError, ValueError, struct.error) as error:
            raise CorruptCheckpoint(
                f"{self._what} cannot be read: {error or type(error).__name__} (byte {self.position - began} of a "
                "pickle)",
                "it is damaged, or in another format",
            ) from error

    def count(self, items: int) -> None:
        """Count items that a maker copies; raises ValueError once they are too many."""
        self._copied += items
        if self._copied > _COPIED:
            raise ValueError(f"it copies {self._copied} items from one container to another, more than {_COPIED}")

    def _do(self, op: int) -> None:
        stack = self._stack
        if op in _SIZED:
            kind, decode = _SIZED[op]
            stack.append(decode(bytes(self._take(self._unpack(kind)))))
        elif op in _GETS:
            number = self._unpack(_GETS[op])
            if number not in self._memo:
                raise ValueError(f"it repeats the value {number}, which it has not kept")
            stack.append(self._memo[number])
        elif op in _PUTS:
            self._memo[self._unpack(_PUTS[op])] = stack[-1]
        elif op == 0x94:
            self._memo[len(self._memo)] = stack[-1]
        elif op in _NUMBERS:
            stack.append(self._unpack(_NUMBERS[op]))
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif op in _TUPLES:
            stack.append(self._tuple([stack.pop() for _ in range(_TUPLES[op])][::-1]))
        elif op == ord("("):
            self._marks.append(stack)
            self._stack = []
        elif op in _ON_MARKED:
            items, self._stack = stack, self._marks.pop()
            _ON_MARKED[op](self, items)
        else:
            self._do_seldom(op)

    def _do_seldom(self, op: int) -> None:
        stack = self._stack
        if op == ord("s"):
            value, key = stack.pop(), stack.pop()
            self._set_items([key, value])
        elif op == ord("a"):
            item = stack.pop()
            self._extend([item])
        elif op == ord("c"):
            stack.append(self._find(self._line(), self._line()))
        elif op == 0x93:
            name, module = stack.pop(), stack.pop()
            if type(name) is not str or type(module) is not str:
                raise TypeError("the name of a global is not a text")
            stack.append(self._find(module, name))
        elif op in (ord("R"), 0x81):
            args, maker = stack.pop(), stack.pop()
            if type(args) is not tuple or not isinstance(maker, Maker):
                raise TypeError("it calls what cannot be called")
            stack.append(maker(args))
        elif op == ord("b"):
            state, target = stack.pop(), stack[-1]
            if not isinstance(target, (Record, Mapping)) or target.state is not None:
                raise TypeError(f"it gives a state to a {type(target).__name__}, or a second one")
            target.state = state
        elif op == ord("Q") and self._persistent is not None:
            stack.append(self._persistent(stack.pop()))
        elif op == 0x80:
            if (protocol := self._byte()) > _NEWEST_PROTOCOL:
                raise ValueError(f"it is of protocol {protocol}; known are those up to {_NEWEST_PROTOCOL}")
        elif op == 0x95:
            self._take(8)
        elif op == 0x8B:
            nbytes = self._unpack(struct.Struct("<i"))
            if not 0 <= nbytes <= _INTEGER_BYTES:
                raise ValueError(f"it has an integer of {nbytes} bytes")
            stack.append(_integer(bytes(self._take(nbytes))))
        else:
            raise ValueError(f"it has the operation {bytes([op])!r}, which is not needed for tensors and plain values")

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise TypeError(f"it puts keys into a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            target[key] = value

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError(f"it appends to a {type(target).__name__}")
        target.extend(items)

    def _add(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not set:
            raise TypeError(f"it adds to a {type(target).__name__}")
        for item in items:
            _check_key(item)
            target.add(item)

    def _push_tuple(self, items: list[Any]) -> None:
        self._stack.append(self._tuple(items))

    def _tuple(self, items: list[Any]) -> tuple[Any, ...]:
        width, nested = len(items), False
        for item in items:
            if type(item) is tuple:
                known = self._nested.get(id(item))
                width, nested = width + (known[1] if known else len(item)), True
        if width > _WIDTH:
            raise ValueError(f"it has a tuple of {width} values, those of tuples in it included; at most {_WIDTH}")
        made = tuple(items)
        if nested:
            self._nested[id(made)] = made, width
        return made

    def _byte(self) -> int:
        return self._take(1)[0]

    def _take(self, nbytes: int) -> memoryview:
        end = self.position + nbytes
        if end > len(self._data):
            raise ValueError(f"{nbytes} bytes are announced, {len(self._data) - self.position} are left")
        piece = self._data[self.position : end]
        self.position = end
        return piece

    def _unpack(self, kind: struct.Struct) -> Any:
        return kind.unpack(self._take(kind.size))[0]

    def _line(self) -> str:
        piece = bytes(self._data[self.position : self.position + _NAME_BYTES])
        line, newline, _ = piece.partition(b"\n")
        if not newline:
            raise ValueError("the name of a global does not end")
        self._take(len(line) + 1)
        return line.decode()


_ON_MARKED: dict[int, Callable[[PickleReader, list[Any]], None]] = {
    ord("t"): PickleReader._push_tuple,
    ord("u"): PickleReader._set_items,
    ord("e"): PickleReader._extend,
    0x90: PickleReader._add,
}


def _check_key(key: Any) -> None:
    if type(key) is int and key.bit_length() > _KEY_BITS:
        raise ValueError(f"it has a key that is an integer of {key.bit_length()} bits")
