"""Plain data out of pickles that others wrote, without running anything in them.

A pickle is a program, and `pickle.load` runs it: it may import any function and call it. The dictionaries of the
original Geneformer are published as pickles of names and numbers, so this module interprets only the instructions that
such data needs. Nothing is ever imported: a "global" is looked up in the few entries of `_GLOBALS`, and any other is
refused by name. `pickle.Unpickler` with a restricted `find_class` would still call `__setstate__` and NumPy's
constructors with arguments of the file's choice, and reserve as much memory as a file claims to need.

Understood: dict, list, tuple, set, str, bytes, int, float, bool, None and NumPy numbers, in pickle protocols 0 to 5.
"""

import os
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# The published dictionaries have at most 4 MB and 0.47 million instructions. An instruction makes one object at the
# most, so these bound the memory to about 1 GB whatever the file says.
MAX_BYTES = 64 * 2**20
MAX_INSTRUCTIONS = 3_000_000
_BYTES_PER_MEMBER = 32  # of a set, roughly

# Python hashes a whole number by its remainder to this prime.
_HASHED_ALIKE = 2**61 - 1

_SCALARS = (str, bytes, int, float, bool, type(None), np.generic)
_MARK = object()


class UnsafePickleError(ValueError):
    """The pickle holds more than plain data; nothing of it was run."""


def _shown(value: Any) -> str:
    # The repr of a container may be exponentially longer than the container.
    return repr(value)[:80] if isinstance(value, str) else f"a {type(value).__name__}"


class _NumberType:
    """A NumPy number type while it is read: made by `numpy.dtype(code, ...)`, given its byte order by BUILD."""

    def __init__(self, code: Any, *flags: Any):
        if not (isinstance(code, str) and re.fullmatch("b1|[iu](1|2|4|8)|f(2|4|8)|c(8|16)", code)):
            raise UnsafePickleError(f"Expected a NumPy number type such as 'f8', found {_shown(code)}.")
        self.dtype = np.dtype(code)

    def set_state(self, state: Any) -> None:
        # (version, byte order, no subarray, names or fields, default size and alignment, flags)
        if not (isinstance(state, tuple) and len(state) == 8 and state[2:] == (None, None, None, -1, -1, 0)):
            raise UnsafePickleError("Expected the state of a plain NumPy number type, found fields or a subarray.")
        if state[1] not in ("<", ">", "|", "="):
            raise UnsafePickleError(f"Expected a byte order, found {_shown(state[1])}.")
        self.dtype = self.dtype.newbyteorder(state[1])


def _number(number_type: Any, data: Any) -> np.generic:
    if not (isinstance(number_type, _NumberType) and isinstance(data, bytes)):
        raise UnsafePickleError("Expected a NumPy number as a type and its bytes.")
    if len(data) != number_type.dtype.itemsize:
        raise UnsafePickleError(f"A NumPy {number_type.dtype} has {number_type.dtype.itemsize} bytes, not {len(data)}.")
    # Scalars know no byte order: a big-endian one becomes the same value in the machine's.
    return np.frombuffer(data, dtype=number_type.dtype)[0]


def _encoded(text: Any, encoding: Any) -> bytes:
    # Protocols 0 to 2 write bytes as their Latin-1 text.
    if not (isinstance(text, str) and encoding == "latin1"):
        raise UnsafePickleError("Expected bytes written as Latin-1 text.")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    # Protocols 0 to 2 write b"" as a call without arguments.
    return b""


def _set(items: Any = ()) -> set:
    if not isinstance(items, list | tuple):
        raise UnsafePickleError("Expected the members of a set.")
    return {_key(item) for item in items}


_GLOBALS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _NumberType,
    "numpy._core.multiarray.scalar": _number,
    "_codecs.encode": _encoded,
    "builtins.bytes": _no_bytes,
    "builtins.set": _set,
}
# As older NumPy and Python named them
_OLD_NAMES = {
    "numpy.core.multiarray.scalar": "numpy._core.multiarray.scalar",
    "__builtin__.bytes": "builtins.bytes",
    "__builtin__.set": "builtins.set",
}


def _key(value: Any) -> Any:
    # The hash of nested tuples can take for ever: a tuple of the same tuple twice, sixty levels deep.
    if not isinstance(value, _SCALARS):
        raise UnsafePickleError(f"Expected names or numbers as keys, found a {type(value).__name__}.")
    if isinstance(value, int) and abs(value) >= _HASHED_ALIKE:
        # Its multiples all have the hash 0, and a dictionary of them takes time in the square of its size.
        raise UnsafePickleError(f"Expected whole numbers below {_HASHED_ALIKE:,} as keys, found a larger one.")
    return value


def _check_plain(value: Any) -> None:
    """Raises UnsafePickleError if a number type or one of our functions is left in the data as a value."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, _SCALARS):
            continue
        if not isinstance(item, dict | list | tuple | set):
            raise UnsafePickleError("A type or function stands among the data.")
        if id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)


class _Machine:
    """Pickle's stack machine, for plain data."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[Any, Any] = {}
        self.copied = 0

    def run(self, data: bytes) -> Any:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number >= MAX_INSTRUCTIONS:
                raise UnsafePickleError(f"Expected at most {MAX_INSTRUCTIONS:,} instructions.")
            name = opcode.name
            if name == "STOP":
                break
            if name in _PUSHED_AS_READ:
                self.stack.append(argument)
            elif name in _PUSHED:
                self.stack.append(_PUSHED[name]())
            elif name in _MEMORIZE:
                # An index that MEMOIZE would give; PUT may skip some, which a dictionary does not mind.
                self.memo[len(self.memo) if argument is None else argument] = self.top(object)
            elif name in _RECALL:
                self.stack.append(self.memo[argument])
            elif name not in _IGNORED:
                step = getattr(self, name, None)
                if step is None:
                    raise UnsafePickleError(f"Refused instruction {name}: plain data does not need it.")
                step(argument)
        if len(self.stack) != 1:
            raise ValueError("it ends without a value")
        value = self.pop(object)
        _check_plain(value)
        return value

    # ---- the stack

    def pop(self, kind: Any) -> Any:
        value = self.top(kind)
        del self.stack[-1]
        return value

    def top(self, kind: Any) -> Any:
        if not isinstance(self.stack[-1], kind) or self.stack[-1] is _MARK:
            raise ValueError(f"an instruction found a {type(self.stack[-1]).__name__} in the wrong place")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("an instruction lacks its mark")
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def update(self, target: dict, pairs: list[Any]) -> None:
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[_key(key)] = value

    # ---- instructions, under the names that pickletools gives them

    def POP(self, _: Any) -> None:
        del self.stack[-1]

    def POP_MARK(self, _: Any) -> None:
        self.pop_to_mark()

    def DUP(self, _: Any) -> None:
        self.stack.append(self.top(object))

    def LIST(self, _: Any) -> None:
        self.stack.append(self.pop_to_mark())

    def APPEND(self, _: Any) -> None:
        item = self.pop(object)
        self.top(list).append(item)

    def APPENDS(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.top(list).extend(items)

    def DICT(self, _: Any) -> None:
        pairs = self.pop_to_mark()
        self.stack.append({})
        self.update(self.stack[-1], pairs)

    def SETITEM(self, _: Any) -> None:
        value, key = self.pop(object), self.pop(object)
        self.update(self.top(dict), [key, value])

    def SETITEMS(self, _: Any) -> None:
        pairs = self.pop_to_mark()
        self.update(self.top(dict), pairs)

    def ADDITEMS(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.top(set).update(map(_key, items))

    def TUPLE(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def TUPLE1(self, _: Any) -> None:
        self.stack.append((self.pop(object),))

    def TUPLE2(self, _: Any) -> None:
        second, first = self.pop(object), self.pop(object)
        self.stack.append((first, second))

    def TUPLE3(self, _: Any) -> None:
        third, second, first = self.pop(object), self.pop(object), self.pop(object)
        self.stack.append((first, second, third))

    def GLOBAL(self, argument: str) -> None:
        # pickletools joins module and name by a blank.
        self.push_global(argument.replace(" ", ".", 1))

    def STACK_GLOBAL(self, _: Any) -> None:
        name, module = self.pop(str), self.pop(str)
        self.push_global(f"{module}.{name}")

    def push_global(self, name: str) -> None:
        name = _OLD_NAMES.get(name, name)
        if name not in _GLOBALS:
            raise UnsafePickleError(
                f"Refused {_shown(name)}: plain data needs no such object, and a pickle that asks for one can "
                "run code. Nothing of it was run. If you trust the file, convert it where it was made, e.g. to JSON."
            )
        self.stack.append(_GLOBALS[name])

    def REDUCE(self, _: Any) -> None:
        arguments, function = self.pop(tuple), self.pop(object)
        if function not in _GLOBALS.values():
            raise UnsafePickleError(f"Refused to call a {type(function).__name__}.")
        # Unlike the other instructions these copy their input, which the memo can offer again and again.
        for copied in arguments:
            if isinstance(copied, str | bytes | list | tuple):
                self.copied += len(copied) * (1 if isinstance(copied, str | bytes) else _BYTES_PER_MEMBER)
        if self.copied > MAX_BYTES:
            raise UnsafePickleError("It copies the same data over and over.")
        try:
            self.stack.append(function(*arguments))
        except TypeError as error:
            raise UnsafePickleError(f"Wrong arguments: {error}.") from error

    def BUILD(self, _: Any) -> None:
        state = self.pop(object)
        if not isinstance(self.top(object), _NumberType):
            raise UnsafePickleError(f"Refused to set the state of a {type(self.top(object)).__name__}.")
        self.top(_NumberType).set_state(state)


# STRING and its like are text of Python 2.
_PUSHED_AS_READ = frozenset([
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
])  # fmt: skip
_PUSHED: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": set,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_MEMORIZE = frozenset(["MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"])
_RECALL = frozenset(["GET", "BINGET", "LONG_BINGET"])
_IGNORED = frozenset(["PROTO", "FRAME"])


def load_plain_pickle(path: str | os.PathLike, *, max_bytes: int = MAX_BYTES) -> Any:
    """The plain data in a pickle file.

    max_bytes  a larger file is not read at all
    Raises     UnsafePickleError, a ValueError that names what was refused; ValueError if the file is no pickle or is
               cut off; FileNotFoundError
    """
    path = Path(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise UnsafePickleError(
            f"{path}: {size:,} bytes, expected at most {max_bytes:,}. Pass max_bytes=... if you trust it."
        )
    data = path.read_bytes()
    # What Git leaves in place of a large file that was not fetched
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself. Run `git lfs pull`.")
    try:
        return _Machine().run(data)
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path}: {error}") from error
    # What a machine without a checker meets in bytes that are no valid program
    except (ValueError, IndexError, KeyError, UnicodeError, OverflowError) as error:
        raise ValueError(f"{path} is not a complete pickle ({error}). Fetch the file again.") from error
