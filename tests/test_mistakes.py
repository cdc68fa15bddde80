"""Options that do not fit end in one line, which names the option and says what to give."""

from __future__ import annotations

import contextlib
import io
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import mistake
from reglue.cli import COMMANDS, parse
from reglue.errors import UserError
from reglue.help import declared
from reglue.mistakes import fits
from reglue.mistakes import mistake as of_parsed

FORMS = {
    "prepare": ["a", "b"],
    "compress": ["a"],
    "train": ["sit", "--store", "a", "--out", "b"],
    "sample": ["a", "--out", "b"],
    "evaluate": ["a"],
    "autoencode": ["a", "b"],
    "reencode": ["a", "b", "--autoencoder", "c"],
    "probe": ["a", "--out", "b"],
    "head": ["a", "--out", "b"],
    "perceive": ["a", "--out", "b", "--head", "c"],
    "import": ["a", "--out", "b"],
    "export": ["a", "--out", "b"],
    "report": ["a"],
    "info": ["a"],
    "list": [],
    "verify": ["a"],
    "edit": ["a", "b", "--out", "c"],
    "synthesise": ["a", "--out", "b", "--head", "c"],
    "prototypes": ["a", "--masks", "b", "--out", "c"],
    "studio": [],
    "demo": [],
}
"""Every command, with what it needs."""
ALL = {name: list(declared(command.load())) for name, command in COMMANDS.items()}
OPTIONS = {name: [option for option in options if not option.positional] for name, options in ALL.items()}


def refused(name: str, *arguments: str) -> str:
    """Without tyro, which takes a second for each of `train`."""
    recipe = FORMS[name][:1] if name == "train" else []
    return of_parsed([name, *recipe], ALL[name], [*FORMS[name][len(recipe) :], *arguments])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_mistyped_option_brings_the_right_one(name: str) -> None:
    for option in OPTIONS[name]:
        typed = option.flags[0][:-1]
        if typed not in {flag for other in OPTIONS[name] for flag in other.flags} and len(typed) > 5:
            told = refused(name, typed, "1")
            assert told.startswith(f"unknown option {typed}; did you mean --"), told
            assert f"`reglue {name}" in told
    assert "did you mean" not in refused(name, "--qqqqqqqqqqqq")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_takes(name: str) -> None:
    for option in OPTIONS[name]:
        words = [] if option.type is bool else next(([w] for w in ("x y", "1.5") if not fits(option.type, [w])), [])
        if option.type is bool:
            assert "takes no value" in refused(name, option.flags[0], "1")
        elif words:
            told = refused(name, option.flags[0], *words)
            assert told.startswith(f"{option.flags[0]} {words[0]}: give "), told
            assert "None" not in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("sample run --out o --gudance-scale 2", "unknown option --gudance-scale; did you mean --guidance-scale?"),
        ("sample run --out o --steps abc", "--steps abc: give a whole number"),
        ("sample run --out o --steps=abc", "--steps abc: give a whole number"),
        ("sample run --out o --steps", "--steps: give a whole number"),
        ("sample run --out o --guidance-interval 0.5", "--guidance-interval 0.5: give two numbers"),
        ("sample run --out o --rounding up", "--rounding up: give truncate or round"),
        ("sample run --out o --guided-channels x", "--guided-channels x: give a whole number or all"),
        ("sample run --out o --other-scales depth", "--other-scales depth: give pairs of a name and a number"),
        ("sample run other --out o", "unexpected other: RUN comes first"),
        ("sample --out o", "no RUN given"),
        ("sample run", "no --out given"),
        ("prepare a b --resolution 2 3 4", "--resolution 2 3 4: give a whole number or two whole numbers"),
        ("prepare a b --features yes", "--features yes: --features takes no value; leave it out"),
        (
            "prepare a b --final-norm no",
            "--final-norm no: --final-norm takes no value; the opposite is --no-final-norm",
        ),
        ("train sit --store s --out r --local.schedule 1", "give pairs of a whole number and a number"),
        ("demo here", "unexpected here: every value needs its option"),
    ],
)
def test_mistakes_are_named(
    arguments: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told in mistake(capsys, monkeypatch, *arguments.split())


@settings(max_examples=60)
@given(st.data())
def test_whatever_is_typed_is_taken_or_refused_in_one_line(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["prepare", "compress", "sample", "probe", "verify"]))
    flags = st.sampled_from([flag for option in OPTIONS[name] for flag in option.flags] or ["--x"])
    words = st.sampled_from(["1", "-1", "0.5", "-.5", "all", "None", "", "-", "a b", "é\n", "=", "--", "-h1", "--x=2"])
    rest = data.draw(st.lists(st.one_of(flags, words, st.text(max_size=3)), max_size=4))
    before = sys.stderr
    with contextlib.redirect_stderr(io.StringIO()) as printed, contextlib.suppress(UserError):
        parse([name, *[word for word in rest if word not in ("-h", "--help")]])
    assert not printed.getvalue()
    assert sys.stderr is before
