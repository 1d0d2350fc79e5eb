from __future__ import annotations

from flashserve.cli.config import flattened, masked


def test_keys_are_masked_and_counted() -> None:
    settings = {"auth": {"api_keys": ["a", "b"], "admin_keys": [], "allowed_hosts": ["h"]}}
    shown = masked(settings)
    assert shown["auth"]["admin_keys"] == []
    assert shown["auth"]["allowed_hosts"] == ["h"]
    assert len(shown["auth"]["api_keys"]) == 2
    assert not {"a", "b"} & set(shown["auth"]["api_keys"])


def test_keys_of_tenants_are_masked_too() -> None:
    shown = masked({"tenants": {"acme": {"keys": ["secret"], "weight": 2.0}}})
    assert shown == {"tenants": {"acme": {"keys": ["********"], "weight": 2.0}}}


def test_sections_become_dotted_names() -> None:
    assert flattened({"a": 1, "b": {"c": [2], "d": None}}) == [
        ("a", 1),
        ("b.c", [2]),
        ("b.d", None),
    ]
