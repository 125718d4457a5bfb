import tracemalloc

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import messages
from protocol.errors import KilnError

leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=20)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=20
)


def depth(tree) -> int:
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    return (1 if isinstance(tree, (dict, list)) else 0) + max(map(depth, inner), default=0)


@given(trees)
def test_a_header_arrives_as_it_was_sent_or_is_refused_for_its_depth(tree):
    header = {"type": "x", "tree": tree}
    frame = messages.pack(header)
    if depth(header) <= messages.NESTING:
        assert messages.unpack(frame) == header
    else:
        with pytest.raises(KilnError, match="nests deeper"):
            messages.unpack(frame)


@settings(max_examples=500)
@given(st.binary(max_size=200) | trees.map(msgpack.packb))
def test_any_bytes_are_a_header_or_a_typed_error(frame):
    try:
        header = messages.unpack(frame)
    except KilnError as error:
        assert error.code == "bad-message" and error.message and error.hint
    else:
        assert isinstance(header["type"], str)


bombs = {
    "list that claims four billion items": b"\x82\xa4type\xa1x\xa1a\xdd\xff\xff\xff\xff",
    "map that claims four billion items": b"\x82\xa4type\xa1x\xa1a\xdf\xff\xff\xff\xff",
    "text that claims four gigabytes": b"\x82\xa4type\xa1x\xa1a\xdb\xff\xff\xff\xff",
    "bytes that claim four gigabytes": b"\x82\xa4type\xa1x\xa1a\xc6\xff\xff\xff\xff",
    "lists of 1024 within one another": b"\x82\xa4type\xa1x\xa1a" + b"\xdc\x04\x00" * 100_000,
    "lists of 65535 within one another": b"\x82\xa4type\xa1x\xa1a" + b"\xdc\xff\xff" * 100_000,
    "maps within one another": b"\x82\xa4type\xa1x\xa1a" + b"\x81\xa1a" * 100_000,
    "an object of a type of its own": b"\x82\xa4type\xa1x\xa1a\xc7\x08\x05pickled!",
    "a timestamp": msgpack.packb({"type": "x", "a": msgpack.Timestamp(1)}),
    "two messages": msgpack.packb({"type": "x"}) * 2,
    "text that is no UTF-8": b"\x82\xa4type\xa1x\xa1a\xa1\xff",
    "a number as a key": msgpack.packb({"type": "x", 5: 1}),
    "a list instead of a map": msgpack.packb(["type", "x"]),
    "a type that is no text": msgpack.packb({"type": 5}),
    "no type": msgpack.packb({"kind": "x"}),
    "nothing": b"",
}


@pytest.mark.parametrize("frame", bombs.values(), ids=bombs.keys())
def test_a_bomb_is_refused_before_it_takes_memory(frame):
    tracemalloc.start()
    try:
        with pytest.raises(KilnError) as caught:
            messages.unpack(frame)
        assert caught.value.code == "bad-message"
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_a_header_over_the_limit_is_refused_on_both_sides():
    header = {"type": "x", "text": "a" * messages.FRAME_BYTES}
    with pytest.raises(KilnError) as caught:
        messages.pack(header)
    assert caught.value.code == "too-large"
    with pytest.raises(KilnError) as caught:
        messages.unpack(msgpack.packb(header))
    assert caught.value.code == "too-large"


def test_fields_are_checked_for_their_type():
    header = {"type": "x", "text": "a", "number": 3, "flag": True, "nil": None}
    assert messages.take(header, "text", str) == "a" and messages.take(header, "absent", str, "b") == "b" == messages.take(
        header, "nil", str, "b"
    )
    assert messages.count(header, "number", 0, 5) == 3
    for name, kind in (("text", int), ("number", str), ("flag", int), ("absent", str), ("nil", list)):
        with pytest.raises(KilnError, match=repr(name)):
            messages.take(header, name, kind)
    with pytest.raises(KilnError, match="0 to 2"):
        messages.count(header, "number", 0, 2)
