"""Plain data comes out as it went in; nothing else comes out, and nothing in a pickle is ever run."""

import builtins
import collections
import contextlib
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellglot.tokenization import restricted_pickle
from cellglot.tokenization.restricted_pickle import UnsafePickleError, load_plain_pickle

numbers = st.one_of(
    st.integers(),
    st.floats(allow_nan=False),
    st.booleans(),
    st.integers(-(2**15), 2**15 - 1).map(np.int16),
    st.floats(allow_nan=False).map(np.float64),
    st.integers(0, 255).map(np.uint8),
    st.booleans().map(np.bool_),
    st.complex_numbers(allow_nan=False).map(np.complex128),
)
scalars = st.one_of(st.none(), st.text(max_size=5), st.binary(max_size=5), numbers)
# Larger whole numbers are refused as keys.
keys = st.one_of(
    st.none(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.integers(-(2**61) + 2, 2**61 - 2),
    st.floats(allow_nan=False),
)
plain = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.sets(st.text(max_size=3), max_size=1),  # larger ones print in any order
        st.dictionaries(keys, inner, max_size=4),
    ),
    max_leaves=12,
)


def read(data: bytes, tmp_path):
    path = tmp_path / "p.pkl"
    path.write_bytes(data)
    return load_plain_pickle(path)


@settings(max_examples=150, deadline=None)
@given(value=plain, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_equals_what_pickle_reads(value, protocol, tmp_path_factory):
    found = read(pickle.dumps(value, protocol=protocol), tmp_path_factory.getbasetemp())
    assert found == value
    assert repr(found) == repr(value)  # types too


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_shared_and_many_items(protocol, tmp_path):
    shared = ["a"]
    value = {"x": shared, "y": shared, "set": {"b", 3, 1.5}, **{f"g{i}": np.float32(i) for i in range(3000)}}
    found = read(pickle.dumps(value, protocol=protocol), tmp_path)
    assert found == value
    assert found["x"] is found["y"]


def test_numbers_as_older_numpy_and_other_machines_wrote_them(tmp_path):
    new = pickle.dumps({"a": np.float64(1.5), "b": np.int16(-3)}, protocol=2)
    assert read(new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"), tmp_path) == {"a": 1.5, "b": -3}
    swapped = pickle.dumps(np.float64(1.5), protocol=0).replace(b"V<\n", b"V>\n")
    assert swapped != pickle.dumps(np.float64(1.5), protocol=0)
    assert read(swapped, tmp_path) == np.frombuffer(struct.pack("<d", 1.5), dtype=">f8")[0]


# ---- programs in disguise


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self):
        return (self.function, self.arguments, self.state) if self.state else (self.function, self.arguments)


numpy_scalar = np.float64(1).__reduce__()[0]


class Plain:
    pass


MALICE = {
    "system": (lambda f: Call(os.system, f"touch {f}"), "posix.system|nt.system"),
    "eval": (lambda f: Call(eval, f"open({f!r}, 'w')"), r"builtin.*\.eval"),
    "exec": (lambda f: Call(exec, f"open({f!r}, 'w')"), r"builtin.*\.exec"),
    "open": (lambda f: Call(open, f, "w"), r"_?io\.open"),
    "subprocess": (lambda f: Call(subprocess.Popen, ["touch", f]), "Popen"),
    "nested": (lambda f: {"a": [1, ({"b": Call(os.system, f"touch {f}")},)]}, "posix.system|nt.system"),
    "argument of an allowed call": (lambda f: Call(set, Call(open, f, "w")), r"_?io\.open"),
    "getattr": (lambda f: Call(getattr, Plain(), "x"), r"builtin.*\.getattr"),
    "import": (lambda f: Call(builtins.__import__, "antigravity"), r"builtin.*\.__import__"),
    "instance": (lambda f: Plain(), "Plain|copyreg|copy_reg"),
    "class": (lambda f: Plain, "Plain"),
    "numpy load": (lambda f: Call(np.load, f, None, True), r"numpy\..*load"),
    "numpy runner": (lambda f: Call(np.fromfile, f), "fromfile"),
    "object array": (lambda f: np.array([Plain()], dtype=object), "numpy.*_reconstruct"),
    "array": (lambda f: np.arange(3), "numpy"),
    "structured scalar": (lambda f: np.zeros(1, dtype="i4,f8")[0], "Expected a NumPy number type"),
    "text scalar": (lambda f: np.str_("abc"), "Expected a NumPy number type"),
    "object dtype": (lambda f: Call(numpy_scalar, np.dtype("O"), b"A" * 8), "Expected a NumPy number"),
    "dtype alone": (lambda f: {"a": np.dtype("f8")}, "A type or function"),
    "function of ours alone": (lambda f: {"a": set}, "A type or function"),
    "subclass": (lambda f: collections.OrderedDict(a=1), "collections.OrderedDict"),
    "default factory": (lambda f: collections.defaultdict(os.getcwd), "collections.defaultdict"),
    "bytearray": (lambda f: bytearray(b"abc"), "bytearray|BYTEARRAY8"),
    "keys of one hash": (lambda f: {k * (2**61 - 1): 1 for k in range(1, 9)}, "Expected whole numbers below"),
    "tuple key": (lambda f: {("a", "b"): 1}, "Expected names or numbers as keys, found a tuple"),
    "encoder": (lambda f: Call(__import__("_codecs").encode, "a" * 9, "zlib"), "Expected bytes written as Latin-1"),
    "too many arguments": (lambda f: Call(set, [1], [2]), "Wrong arguments"),
}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", MALICE)
def test_everything_else_is_refused_by_name_and_not_run(name, protocol, tmp_path):
    make, message = MALICE[name]
    trace = tmp_path / "executed"
    data = pickle.dumps(make(str(trace)), protocol=protocol)
    with pytest.raises(UnsafePickleError, match=message):
        read(data, tmp_path)
    assert not trace.exists()
    assert "antigravity" not in sys.modules  # opens a web browser when imported


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'touch executed'\ntR.",
        b"(S'touch executed'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch executed'\no.",  # OBJ
        b"\x80\x02cos\nsystem\nU\x0etouch executed\x85\x81.",  # NEWOBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"Psystem\n.",  # PERSID
        b"\x80\x02]}U\x08__dict__]sb.",  # BUILD of a list
        b"\x80\x02cbuiltins\nset\n}U\x08__code__Nsb.",  # BUILD of a function
        b"\x80\x02U\x01a)R.",  # call of a text
        b"\x80\x04\x8c\x02os\x8c\x0epath.os.system\x93.",  # dotted name
    ],
)
def test_hand_written_programs_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnsafePickleError, match=r"p\.pkl: Refused"):
        read(data, tmp_path)
    assert not (tmp_path / "executed").exists()


def test_allowed_functions_are_not_changed_by_a_refused_pickle(tmp_path):
    before = dict(restricted_pickle._GLOBALS)
    with pytest.raises(UnsafePickleError):
        read(b"\x80\x02cbuiltins\nset\n}U\x0c__defaults__Nsb.", tmp_path)
    assert before == restricted_pickle._GLOBALS
    assert read(pickle.dumps({"a": {1, 2}}, protocol=2), tmp_path) == {"a": {1, 2}}


# ---- bombs


def nested_tuples(depth: int) -> bytes:
    """Pushes a tuple of the same tuple twice, and so on: small in memory, 2**depth long when walked or hashed."""
    levels = (b"h%ch%c\x86q%c0" % (i, i, i + 1) for i in range(depth))
    return b")q\x000" + b"".join(levels) + b"h%c" % depth


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",  # BINBYTES8 that claims exabytes
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",  # BYTEARRAY8
        b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"abc.",  # BINUNICODE8
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"abc.",  # LONG4
        b"\x80\x02]r\xff\xff\xff\x7f0h\x00.",  # memo index of two billion
        b"I" + b"9" * 1_000_000 + b"\n.",  # decimal text that takes quadratic time
        b"\x80\x02}" + nested_tuples(60) + b"K\x01s.",  # key that is hashed for ever
        b"\x80\x02cbuiltins\nset\n(" + b"".join(b"M" + struct.pack("<H", i) for i in range(60_000)) + b"lq\x000"
        # the same list copied 3,000 times, all copies kept
        + b"(" + b"cbuiltins\nset\nh\x00\x85R" * 3000 + b"t.",
    ],
    ids=["bytes", "bytearray", "text", "long", "memo", "digits", "hash", "copies"],
)  # fmt: skip
def test_bombs_are_refused_in_little_time_and_memory(data, tmp_path):
    start = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"p\.pkl"):
            read(data, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 300e6
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 30


def test_the_number_of_objects_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(restricted_pickle, "MAX_INSTRUCTIONS", 1000)
    with pytest.raises(UnsafePickleError, match="Expected at most 1,000 instructions"):
        read(b"(" + b"]" * 1000 + b"t.", tmp_path)
    assert read(b"(" + b"]" * 990 + b"t.", tmp_path) == ([],) * 990


def test_a_shared_structure_is_walked_once(tmp_path):
    found = read(b"\x80\x02" + nested_tuples(100) + b".", tmp_path)
    assert isinstance(found, tuple)


def test_large_files_are_not_read(tmp_path):
    path = tmp_path / "big.pkl"
    path.write_bytes(pickle.dumps("x" * 1000))
    with pytest.raises(UnsafePickleError, match=r"1,0\d\d bytes, expected at most 999"):
        load_plain_pickle(path, max_bytes=999)


# ---- no pickles at all


def test_truncation_anywhere_is_an_error(tmp_path):
    data = pickle.dumps({"a": np.float64(1), "b": [1, (2, "c")]})
    for end in range(len(data)):
        with pytest.raises(ValueError, match="is not a complete pickle"):
            read(data[:end], tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"gene\tid\nA\t1\n", b"{}", b"PK\x03\x04", b"\x80\x04.", b"\x80\x04NN.", b"0.", b"h\x07."]
)
def test_other_files_are_an_error(data, tmp_path):
    with pytest.raises(ValueError, match=r"p\.pkl"):
        read(data, tmp_path)


def test_what_git_leaves_of_a_large_file(tmp_path):
    with pytest.raises(ValueError, match="Git LFS pointer"):
        read(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n", tmp_path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files_give_data_or_a_value_error(data, tmp_path_factory):
    whole = bytearray(pickle.dumps({"a": np.int16(3), "b": [1.5, {"c"}]}, protocol=data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        read(bytes(whole), tmp_path_factory.getbasetemp())


def test_every_instruction_is_read_or_refused_on_purpose():
    """A new Python may bring new instructions: they are refused until somebody looks at them."""
    handled = {name for name in vars(restricted_pickle._Machine) if name.isupper()}
    for group in ("_PUSHED_AS_READ", "_PUSHED", "_MEMORIZE", "_RECALL", "_IGNORED"):
        handled |= set(getattr(restricted_pickle, group))
    refused = {opcode.name for opcode in pickletools.opcodes} - handled - {"STOP"}
    assert refused == {
        "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID",
        "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "FROZENSET",
    }  # fmt: skip
