"""Patterns fit what Python's regular expressions fit, without their worst cases."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashserve.store.adapters.patterns import Pattern, PatternError, first_match

NAMES = (
    "q_proj",
    "lm_head",
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.gate_proj",
    "model.layers.1.mlp.up_proj",
)


def peft_fits(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "proj",
        "self_attn.q_proj",
        r"self_attn\.q_proj",
        "model.layers.0.self_attn.q_proj",
        "^model.layers.1.*",
        "^layers.1.*",
        r"layers\.(0|1)\.mlp\.\w+",
        r".*\.layers\.\d+\.(?:self_attn|mlp)\.(?P<which>q|k|gate)_proj",
        r".*?(?:language|text|layers).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?",
        r"model\.layers\.[\d]{1,}\.mlp\.[a-z_]+",
        r"layers\.[^1]\..*",
        r"layers\.1{2}\..*",
        r"layers\.\d{2,3}\..*",
        "(mlp|self_attn)?.?(gate|up)_proj",
        "lm_head$|embed_tokens",
        "",
        "()",
        "a{,3}",
        "[]x]",
    ],
)
def test_a_pattern_fits_the_names_that_it_fits_in_peft(pattern: str) -> None:
    assert [Pattern(pattern).fits(name) for name in NAMES] == [
        peft_fits(pattern, name) for name in NAMES
    ]


_ATOMS = st.sampled_from(["a", "b", r"\.", ".", "[ab]", "[^a]", r"\d", "^", "$"])
_PATTERNS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{1,}", "*?"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=6,
)


@given(_PATTERNS, st.text("ab.1", max_size=7))
def test_any_pattern_fits_as_in_python(pattern: str, name: str) -> None:
    assert Pattern(pattern).fits(name) == peft_fits(pattern, name)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "(.*)*x", ".*.*.*.*.*.*.*.*.*x", "(a?){64}a{64}"]
)
def test_a_pattern_that_would_run_for_years_ends(pattern: str) -> None:
    assert not Pattern(pattern).fits("a" * 200 + "!")


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("a" * 513, "512 characters"),
        ("(a", "closing bracket"),
        ("[a", "closing bracket"),
        ("a)", "too many"),
        ("*a", "repeats nothing"),
        ("a**", "repeats a repetition"),
        ("(?!lm_head).*", "looks around"),
        ("(?i)a", "looks around"),
        (r"(a)\1", r"\1"),
        ("a{65}", "{65}"),
        ("a{3,2}", "{3,2}"),
        ("((a{64}){64}){64}", "complicated"),
        ("(" * 17 + ")" * 17, "in one another"),
        ("[z-a]", "range z-a"),
        ("a\\", "not taken"),
    ],
)
def test_what_is_no_pattern_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(PatternError, match=re.escape(why)):
        Pattern(pattern)


@given(st.text("ab()[]{}|*+?^$.\\-,1:P<>!", max_size=12), st.text("ab.1-", max_size=6))
def test_any_text_is_a_pattern_or_refused(text: str, name: str) -> None:
    try:
        pattern = Pattern(text)
    except PatternError:
        return
    pattern.fits(name)


def test_the_first_pattern_that_fits_counts() -> None:
    patterns = {"k_proj": 1, "layers.0.*": 2, "q_proj": 3}
    assert first_match(patterns, "model.layers.0.self_attn.q_proj") == "layers.0.*"
    assert first_match(patterns, "model.layers.1.self_attn.q_proj") == "q_proj"
    assert first_match(patterns, "model.layers.1.mlp.up_proj") is None
