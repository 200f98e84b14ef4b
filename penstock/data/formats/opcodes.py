"""Python's pickle opcodes, as many as lists of integers and NumPy arrays of integers need.

`pickled.py` reads files with it. It is an interpreter of its own rather than a restricted
unpickler: nothing is imported or called by name, no length is believed, and what is not wanted is
refused at the opcode that would make it.
Source: Python's pickletools (opcodes), NumPy's ndarray.__reduce__ (what an array's pickle calls).
"""

import array
import re
import struct
from typing import Any

from penstock.data.formats.pickled_arrays import Made, Name, Refused, reduce

_MARK = object()
_MOST_LISTS = 1 << 24
"""An empty list is one byte in a file and two hundred in memory."""
_STARTS = re.compile(
    rb"\x80[\x02-\x05](?:\x95.{8})?(?:\]|c|\x8c)|\(lp?|\](?:q|\(|\.)|cnumpy", re.DOTALL
)


def looks_like_pickle(head: bytes) -> bool:
    """Whether a file that begins so may be a pickled list or array: no other kind is read."""
    return _STARTS.match(head) is not None


class MalformedPickleError(ValueError):
    """The bytes are no whole pickle."""


class Items:
    """A list being built; runs of integers take eight bytes each."""

    def __init__(self) -> None:
        """Begin empty."""
        self.integers: array.array[int] = array.array("q")
        self.others: list[Any] = []

    def add(self, value: object) -> None:
        """Append one object."""
        if type(value) is int:
            try:
                self.integers.append(value)
            except OverflowError:
                raise Refused("an integer of more than 64 bits") from None
        elif isinstance(value, Items | Made):
            self.others.append(value)
        else:
            raise Refused(f"a list of {type(value).__name__}, not of integers, lists or arrays")


def read_opcodes(data: Any) -> object:  # noqa: ANN401 - bytes or a mapped file
    """What a pickle's opcodes leave: an `Items`, a `Made`, or something else that is no list.

    Raises:
        Refused: at an opcode, name or value that no list or array of integers needs.
        MalformedPickleError: truncated or contradicting itself.
    """
    try:
        return _Machine(data).run()
    except Refused:
        raise
    except (IndexError, struct.error, ValueError, TypeError, OverflowError, EOFError) as error:
        raise MalformedPickleError(str(error)) from None


class _Machine:
    """The pickle machine: a stack, a memo, and a position in the data."""

    def __init__(self, data: Any) -> None:  # noqa: ANN401 - as above
        self._data, self._at = data, 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._lists = 0

    def run(self) -> object:
        """Execute up to STOP; returns what is left on the stack."""
        while True:
            code = self._data[self._at]
            self._at += 1
            if code == ord("."):
                if len(self._stack) != 1:
                    raise ValueError
                return self._stack[0]
            if code in b"KMJ":
                self._run_of_integers()
            elif not (self._scalar(code) or self._collection(code) or self._memory(code)):
                self._object(code)

    def _run_of_integers(self) -> None:
        """The three opcodes nearly every token is written with, in one tight loop."""
        data, at, push = self._data, self._at - 1, self._stack.append
        while True:
            code = data[at]
            if code == 0x4D:  # BININT2
                push(data[at + 1] | data[at + 2] << 8)
                at += 3
            elif code == 0x4B:  # BININT1
                push(data[at + 1])
                at += 2
            elif code == 0x4A:  # BININT
                push(int.from_bytes(data[at + 1 : at + 5], "little", signed=True))
                at += 5
            else:
                self._at = at
                return

    def _number(self, form: str, size: int) -> int:
        data = self._take(size)
        return struct.unpack(form, data)[0]

    def _take(self, size: int) -> bytes:
        """The next bytes, all of which must be there before any is copied."""
        if size < 0 or size > len(self._data) - self._at:
            raise EOFError
        self._at += size
        return self._data[self._at - size : self._at]

    def _line(self) -> str:
        """Text up to the end of the line."""
        end = self._data.find(b"\n", self._at, self._at + 256)
        if end < 0:
            raise EOFError
        line = self._data[self._at : end]
        self._at = end + 1
        return bytes(line).decode("ascii")

    def _scalar(self, code: int) -> bool:
        """Integers, strings, bytes and None."""
        push = self._stack.append
        if code in b"\x8aIL":  # LONG1, INT, LONG
            push(self._integer(code))
        elif code in b"\x8cX\x8d":  # strings
            size = self._number(*{0x8C: ("<B", 1), 0x58: ("<I", 4), 0x8D: ("<Q", 8)}[code])
            push(self._take(size).decode("utf-8", "surrogatepass"))
        elif code in b"CB\x8eUT\x96":  # bytes, Python 2's strings, a bytearray
            sizes = {ord("C"): "<B", ord("U"): "<B", ord("B"): "<I", ord("T"): "<i"}
            form = sizes.get(code, "<Q")
            push(bytes(self._take(self._number(form, struct.calcsize(form)))))
        elif code == ord("V"):  # a string up to the end of the line
            end = self._data.find(b"\n", self._at)
            push(self._take(end - self._at).decode("raw-unicode-escape"))
            self._take(1)
        elif code == ord("N"):
            push(None)
        elif code in b"\x88\x89":  # True, False
            push(code == 0x88)
        else:
            return False
        return True

    def _integer(self, code: int) -> object:
        """An integer as text or as up to eight bytes; protocol 0 spells booleans as integers."""
        if code == 0x8A:
            size = self._number("<B", 1)
            if size > 8:
                raise Refused("an integer of more than 64 bits")
            return int.from_bytes(self._take(size), "little", signed=True)
        line = self._line()
        if code == ord("I") and line in ("00", "01"):
            return line == "01"
        if len(line) > 24:
            raise Refused("an integer of more than 64 bits")
        return int(line.removesuffix("L"))

    def _collection(self, code: int) -> bool:
        """Lists and tuples."""
        stack = self._stack
        if code == ord("]"):
            stack.append(self._new_list())
        elif code == ord("("):
            stack.append(_MARK)
        elif code == ord("a"):
            value = stack.pop()
            self._list().add(value)
        elif code == ord("e"):
            values = self._to_mark()
            target = self._list()
            for value in values:
                target.add(value)
        elif code == ord("l"):
            target = self._new_list()
            for value in self._to_mark():
                target.add(value)
            stack.append(target)
        elif code == ord("t"):
            stack.append(tuple(self._to_mark()))
        elif code in b")\x85\x86\x87":  # tuples of 0 to 3
            size = b")\x85\x86\x87".index(code)
            stack[len(stack) - size :] = [tuple(stack[len(stack) - size :])]
        else:
            return False
        return True

    def _new_list(self) -> Items:
        self._lists += 1
        if self._lists > _MOST_LISTS:
            raise Refused(f"more than {_MOST_LISTS:,} lists")
        return Items()

    def _list(self) -> Items:
        if not isinstance(self._stack[-1], Items):
            raise TypeError
        return self._stack[-1]

    def _to_mark(self) -> list[Any]:
        """What stands above the last mark, which goes too."""
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                found = self._stack[place + 1 :]
                del self._stack[place:]
                return found
        raise IndexError

    def _memory(self, code: int) -> bool:
        """The memo, and what only frames the stream."""
        if code == ord("\x94"):
            self._memo[len(self._memo)] = self._stack[-1]
        elif code in b"pqr":
            self._memo[self._place(code)] = self._stack[-1]
        elif code in b"ghj":
            place = self._place(code)
            if place not in self._memo:
                raise IndexError
            self._stack.append(self._memo[place])
        elif code == 0x80:
            if self._number("<B", 1) > 5:
                raise Refused("a protocol above 5")
        elif code == 0x95:
            if self._number("<Q", 8) > len(self._data) - self._at:
                raise EOFError
        elif code == ord("0"):
            self._stack.pop()
        else:
            return False
        return True

    def _place(self, code: int) -> int:
        """The memo's index of a text, one-byte or four-byte opcode."""
        if code in b"pg":
            return int(self._line())
        return self._number("<B", 1) if code in b"qh" else self._number("<I", 4)

    def _object(self, code: int) -> None:
        """Names and calls, of which only an array's own are known."""
        if code == ord("c"):
            self._stack.append(Name(self._line(), self._line()))
        elif code == 0x93:
            name, module = self._stack.pop(), self._stack.pop()
            self._stack.append(Name(str(module), str(name)))
        elif code == ord("R"):
            arguments, function = self._stack.pop(), self._stack.pop()
            self._stack.append(reduce(function, arguments))
        elif code == ord("b"):
            state = self._stack.pop()
            if not isinstance(self._stack[-1], Made):
                raise Refused("an object that is no array")
            # In place: later opcodes refer to the same object through the memo.
            self._stack[-1].build(state)
        else:
            raise Refused(f"opcode {code:#04x}, which no list or array needs")
