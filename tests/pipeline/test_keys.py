import hashlib
from pathlib import Path

import pytest

from pipeline.keys import canonical, differences, digest


def test_canonical_form_is_sorted_compact_and_keeps_letters():
    assert canonical({"b": [1, 2.5, None, True], "a": {"ü": "x"}}) == '{"a":{"ü":"x"},"b":[1,2.5,null,true]}'


def test_digest_is_the_sha256_of_the_canonical_text():
    assert digest({"b": 1, "a": 2}) == hashlib.sha256(b'{"a":2,"b":1}').hexdigest()


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": float("nan")}, "key.a"),
        ({"a": [1, float("inf")]}, r"key.a\[1\]"),
        ({"a": {1, 2}}, "key.a: a set"),
        ({"a": {"b": Path("x")}}, "key.a.b: a PosixPath"),
        ({1: "a"}, "key 1 is a int"),
        ({"f": print}, "key.f: a builtin_function_or_method"),
    ],
)
def test_values_without_a_stable_text_are_refused(value: object, place: str):
    with pytest.raises((TypeError, ValueError), match=place):
        canonical(value)


def test_differences_name_the_changed_leaves():
    old = {"config": {"rank": 8, "alpha": 16.0}, "base": "x"}
    new = {"config": {"rank": 16, "alpha": 16.0}, "base": "x", "seed": 1}
    assert list(differences(old, new)) == ["config.rank: 8 -> 16", "seed: null -> 1"]
