"""Options in files: what is saved is read back, what is typed wins, and no file brings a traceback."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import mistake, run_reglue
from reglue import cli
from reglue.cli import COMMANDS, parse
from reglue.config_files import read, save, unchecked, with_values
from reglue.errors import Stopped, UserError
from reglue.help import RECIPE, declared
from reglue.mistakes import fits
from reglue.papers import RECIPES
from test_mistakes import ALL, FORMS

MORE = {
    "prepare": "--resolution 32 64 --layers 2 3 --features --features-dtype int8 --no-final-norm --share 0.5",
    "compress": "--kind pca --layers last",
    "train": "--local.schedule 5 0.5 7 1 --times lead --times-options delta 0.15 --optimisation.compile no "
    "--no-deterministic --optimisation.learning-rate 1e-5 --track wandb trackio --position-grid 4 8",
    "sample": "--classes 1 no --guidance-interval 0.25 0.75 --other-scales depth 1.5 --guided-channels all",
    "edit": "--keep local --classes yes --count 3 --precision bfloat16",
    "evaluate": "--feature-network inception --out report.json",
    "autoencode": "--validation 0.25 --measure-lpips f g --architecture.widths 32 64",
    "head": "--masks m --class-names sky ground",
    "report": "--classes 3 5 --samples-per-class 2",
    "synthesise": "--format yolo --count 5",
}
"""Options of all kinds, for the commands of `FORMS`."""


def beginning(name: str) -> Any:
    """A command's options before anything is said."""
    return unchecked(COMMANDS[name].load(), {"recipe": RECIPES["sit"]} if name == "train" else {})


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_repeated_from_its_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = [name, *FORMS[name], *MORE.get(name, "").split()]
    monkeypatch.chdir(tmp_path)
    ran: list[Any] = []
    monkeypatch.setattr("reglue.cli.function_of", lambda kind: ran.append)
    monkeypatch.setattr("reglue.cli.say_what_follows", lambda options: None)
    for more in ([*typed, "--save-config", "saved.yaml"], [name, "--config=saved.yaml", "--save-config=again.yaml"]):
        monkeypatch.setattr("sys.argv", ["reglue", *more])
        cli.main()
    assert ran[0] == ran[1] == parse(typed)
    first, second = (Path(file).read_text().partition("\n")[2] for file in ("saved.yaml", "again.yaml"))
    assert first == second


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an option's type, but texts that would be taken for another type of a union."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return st.sampled_from(parts)
    if origin is Mapping:
        return st.dictionaries(values_of(parts[0]), values_of(parts[1]), min_size=1, max_size=2)
    if origin is tuple and parts[-1] is ...:
        return st.lists(values_of(parts[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values_of, parts))
    if parts:
        others = [part for part in parts if part not in (str, Path)]
        other_text = lambda value: not isinstance(value, str | Path) or not any(fits(p, [str(value)]) for p in others)  # noqa: E731
        return st.one_of(*map(values_of, parts)).filter(other_text)
    return {
        NoneType: st.none(),
        bool: st.booleans(),
        int: st.integers(-(10**20), 10**20),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(st.characters(), max_size=8)
        | st.sampled_from(["no", "1", "null", "~", "- a", "#", "a: b", "None"]),
        Path: st.text(st.characters(codec="utf-8"), max_size=8).map(Path),
    }[kind]


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_whatever_value_an_option_has_is_read_back(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    name = data.draw(st.sampled_from([name for name in COMMANDS if ALL[name]]))
    options = data.draw(st.lists(st.sampled_from(ALL[name]), min_size=1, max_size=4, unique_by=lambda o: o.name))
    given = {option.name: data.draw(values_of(option.type), option.name) for option in options}
    file = tmp_path_factory.getbasetemp() / "saved.yaml"
    save(file, [name], with_values(beginning(name), given), beginning(name))
    found = read(file, ALL[name])
    assert found == {key: given[key] for key in found}
    defaults = {option.name: option.default for option in declared(COMMANDS[name].load(), beginning(name))}
    assert all(value == defaults[key] for key, value in given.items() if key not in found)


def test_names_are_written_with_dots_or_as_mappings_and_what_is_typed_wins(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(
        "recipe: reglue\nstore: s\nout: r\nmodel: tiny\noptimisation:\n  steps: 50\n  learning_rate: 1e-3\n"
        "  compile: no\nlocal: {compressor: conv-8}\nsampling.steps: 40\ndeterministic: false\n"
        "times: lead\ntimes-options: {delta: 0.2}\nworkers: null\n"
    )
    options = parse(["train", "--config", str(file), "--optimisation.steps", "70", "--deterministic"])
    recipe = options.recipe
    assert (recipe.model, recipe.optimisation.steps, recipe.optimisation.learning_rate) == ("tiny", 70, 1e-3)
    assert (recipe.optimisation.compile, recipe.local.compressor, recipe.sampling.steps) == ("no", "conv-8", 40)
    assert (options.deterministic, recipe.times_options, options.workers) == (True, {"delta": 0.2}, None)
    assert parse(["train", "sit", f"--config={file}", "--local.compressor", "c"]).recipe.name == "sit"


def test_what_is_typed_may_make_a_file_fit(tmp_path: Path) -> None:
    file = tmp_path / "int8.yaml"
    file.write_text("images: photos\nfeatures-dtype: int8\n")
    with pytest.raises(UserError, match="add --features"):
        parse(["prepare", "other", "store", "--config", str(file)])
    options = parse(["prepare", "--config", str(file), "other", "store", "--features"])
    assert (options.images, options.features_dtype) == (Path("other"), "int8")


def test_help_shows_what_a_file_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f.yaml").write_text("recipe: sit\nlog-every: 7\n")
    for words in ("sample run --help", f"train --config {tmp_path / 'f.yaml'} --help"):
        with pytest.raises(SystemExit):
            parse(words.split())
        text = " ".join(capsys.readouterr().out.split())
        assert "--config takes options from a YAML file" in text
        assert "--save-config writes such a file" in text
    assert text.startswith("usage: reglue train sit ")
    assert "(default: 7)" in text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("rundng: up", "{}, line 1: unknown option rundng; did you mean rounding?"),
        (
            "count: 2\n\nguidance:\n  scale: 3",
            "{}, line 4: unknown option guidance.scale; did you mean guidance-scale?",
        ),
        ("steps: many", "{}, line 1: steps many: give a whole number"),
        ("steps: [1, 2]", "{}, line 1: steps 1 2: give a whole number"),
        ("steps: 3\nsteps: 4", "{}, line 2: steps is there twice; keep one"),
        ("rounding: up", "{}, line 1: rounding up: give truncate or round"),
        ("steps: &a 3\ncount: *a", "{}: options take no aliases (*NAME); write the values out"),
        ("- steps", "{} is no YAML file of options (it begins with no name of an option and a colon)"),
        ("steps: {", "{} is no YAML file of options (while parsing a flow node"),
        ("steps: " + "[" * 600, "{} is "),
        ("steps: !!python/object/apply:os.system ['true']", "{}, line 1: steps true: give a whole number"),
        ("steps: 0", "--steps 0: choose at least 1"),
        ("recipe: sit", "{}, line 1: unknown option recipe"),
    ],
)
def test_mistakes_in_a_file_are_named(
    content: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(content)
    said = mistake(capsys, monkeypatch, "sample", "run", "--out", "o", "--config", file)
    assert said.startswith(f"reglue: {told.format(file)}")


def test_a_file_that_is_not_there_or_not_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "missing.yaml"
    said = mistake(capsys, monkeypatch, "sample", "run", "--out=o", "--config", missing)
    assert said == f"reglue: {missing}: No such file or directory"
    assert mistake(capsys, monkeypatch, "demo", "--config") == "reglue: --config: give a path"
    assert "did you mean --save-config?" in mistake(capsys, monkeypatch, "demo", "--save-confg", "f")


WILD = st.one_of(
    st.binary(max_size=30),
    st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from([o.name for o in ALL["train"]]) | st.text(max_size=3), inner, max_size=3)
        ),
        max_leaves=8,
    ).map(lambda value: yaml.safe_dump(value).encode()),
    st.text(st.sampled_from("steps: -[]{}&*a!?|>'\"%@`#,\n\t0.~"), max_size=20).map(str.encode),
)


@settings(deadline=None, max_examples=100)
@given(name=st.sampled_from(["train", "sample", "prepare"]), content=WILD)
def test_any_file_is_read_or_refused_in_one_line(
    name: str, content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "wild.yaml"
    file.write_bytes(content)
    told = str(file)
    with suppress(UserError):
        try:
            with_values(beginning(name), read(file, [RECIPE, *ALL[name]]))
        except UserError as error:
            told = str(error)
            raise
    assert told.startswith(str(file))


def test_the_command_line_writes_and_reads_it(tmp_path: Path) -> None:
    run_reglue("list", str(tmp_path), "--sort", "loss", "--save-config", str(tmp_path / "new" / "list.yaml"))
    text = (tmp_path / "new" / "list.yaml").read_text()
    assert text.startswith("# `reglue list --config list.yaml` repeats this command.\n")
    assert "\nsort: loss\n" in text
    assert max(map(len, text.splitlines())) <= 100 + len(str(tmp_path))
    run_reglue("list", "--config", str(tmp_path / "new" / "list.yaml"))


def test_the_file_may_lie_in_the_folder_that_the_command_makes(tmp_path: Path) -> None:
    out = tmp_path / "clothes"
    sampling = ("sample", "starter", "--out", str(out), "--count=1", "--steps=1")
    for _ in range(2):  # The second time there is nothing left to do.
        run_reglue(*sampling, "--save-config", out / "in" / "a.yaml")
        assert parse(["sample", "--config", str(out / "in" / "a.yaml")]) == parse([*sampling])
    run_reglue("verify", out)
    editing = ("edit", "starter", out / "000000.png", "--out", out, "--save-config", out / "b.yaml")
    assert run_reglue(*editing, check=False).returncode == 2
    assert not (out / "b.yaml").exists(), "what is refused leaves nothing"
    run_reglue("info", out, "--out", tmp_path / "seen.png", "--save-config", tmp_path / "info.yaml")


def test_what_is_stopped_leaves_the_file_too(tmp_path: Path) -> None:
    arguments = ["sample", "starter", "--out", str(tmp_path / "out"), "--save-config", str(tmp_path / "out" / "a.yaml")]
    with suppress(Stopped), cli.saving(parse(arguments), arguments):
        assert not (tmp_path / "out").exists()
        raise Stopped
    assert parse(["sample", "--config", arguments[-1]]) == parse(arguments)


@pytest.mark.parametrize("place", ["new", "runs", "runs/new", "runs/there"])
def test_the_file_is_not_where_the_output_goes(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/there").mkdir(parents=True)
    out = "new" if place == "new" else "runs/new"
    said = mistake(capsys, monkeypatch, "sample", "starter", "--out", out, "--save-config", place)
    assert said.startswith(f"reglue: --save-config {place}: a folder or the output is there; choose another file")
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "there"]
