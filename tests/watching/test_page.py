"""The page of a report: whole, safe from what runs are called, and nothing loaded."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reglue.data.plots import as_svg, beside_preview, curves
from reglue.errors import UserError
from reglue.watching.page import Card, Figures, Nearest, Page, RunShown, Semantics, write_page

RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)


def shown(name: str, **changes: Any) -> RunShown:
    run = RunShown(
        name=name,
        about={"recipe": "reglue, 6 blocks"},
        provenance={"store": "/data/store"},
        cards=(Card("97.4", "%", "of samples are recognised"),),
        rows=("zero", "one"),
        samples={"guidance 2": pixels(2, 3, 6, 8), "without guidance": pixels(2, 4, 6, 8)},
        curves={"latent": [(1, 2.0), (2, 1.0)], "alignment": [(1, -0.1), (2, -0.3)]},
        previews=((10, pixels(20, 30)),),
        nearest=Nearest(pixels(2, 6, 8), pixels(2, 3, 6, 8), np.array([[1.0, 7, 8], [6, 7, 8]]), 5.0, "tokens", 4000),
        semantics=Semantics(pixels(2, 6, 8), pixels(2, 2, 3), pixels(3, 6, 8), pixels(3, 2, 3)),
        figures=(Figures("step 10", {"recall": "0.61 [0.5, 0.7]"}, {"images": "samples"}, ("warning: few images",)),),
        checkpoints=({"step": "1,500", "size": "33 MB"},),
        recipe={"model": "S/2"},
        command="reglue train reglue --store S",
    )
    return replace(run, **changes)


def page_of(*runs: RunShown, **changes: Any) -> Page:
    page = Page(
        title="REGLUE & digits <1>",
        lead="It learned.",
        runs=runs or (shown("REGLUE"),),
        stage_seconds={"prepare": 10.0, "train": 241.0},
        protocol={"seed": 7, "date": "today"},
        commands=("reglue prepare a b",),
    )
    return replace(page, **changes)


def written(folder: Path, page: Page) -> str:
    write_page(folder / "report.html", page)
    return (folder / "report.html").read_text()


def pictures(page: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(code))) for code in re.findall(r"base64,([A-Za-z0-9+/=]+)", page)]


def test_the_page_says_everything_and_loads_nothing(tmp_path: Path) -> None:
    page = written(tmp_path, page_of())
    for said in ("REGLUE &amp; digits &lt;1&gt;", "97.4", "4,000", "4 min 01 s", "zero", "0.61 [0.5, 0.7]", "1,500"):
        assert said in page
    for said in ("reglue train reglue --store S", "&#34;seed&#34;: 7", "warning: few images", "/data/store", "step 10"):
        assert said in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert "url(" not in page.replace("url(#", "")
    # One sample is nearer than half the typical distance, and the legend shows how that looks.
    assert page.count('class="close"') == 2
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_pictures_are_whole_numbers_of_the_pixels_given(tmp_path: Path) -> None:
    run = shown("SiT", curves={})
    hero, guided = pictures(written(tmp_path, page_of(run)))[:2]
    assert hero.mode == "RGBA"
    enlarged = np.asarray(guided)
    factor = enlarged.shape[0] // 6
    assert (enlarged[::factor, ::factor, :3][:, :8] == run.samples["guidance 2"][0, 0]).all()
    assert (enlarged[:, 8 * factor : 10 * factor, 3] == 0).all(), "the gap between two images is clear"


def test_runs_are_compared_in_one_plot_and_beside_each_other(tmp_path: Path) -> None:
    plain = shown("SiT", curves={"latent": [(1, 3.0)]}, nearest=None, semantics=None)
    page = written(tmp_path, page_of(shown("REGLUE"), plain, differing={"--seed": ("0", "1")}))
    assert page.count("<svg") == 1
    assert page.count(">latent<") == page.count(">alignment<") == 1
    assert "SiT, guidance 2" in page
    assert "--sets: 4" in page
    assert "--seed" in page
    other = written(tmp_path, page_of(shown("REGLUE"), replace(plain, rows=("a", "b"))))
    assert "--sets: 1" in other, "other classes have tables of their own"


def test_whatever_is_missing_is_left_out(tmp_path: Path) -> None:
    page = written(tmp_path, page_of(RunShown("SiT", {}, {}, notes=("It has no checkpoint.",)), stage_seconds={}))
    assert "<svg" not in page
    assert "<img" not in page
    assert "It has no checkpoint." in page
    alone = shown("SiT", rows=("",), samples={"": pixels(1, 1, 64, 48)}, figures=(), previews=(), checkpoints=())
    assert "Samples of SiT" in written(tmp_path, page_of(alone))


HOSTILE = ["<script>x</script>", '"><img src=x onerror=y>', "{{ 7 * 7 }}", "$\\x$", "</style>"]


class Tags(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen += [tag, *(f"{tag} {name}" for name, _ in attrs)]


@settings(max_examples=8)
@given(
    st.text(min_size=1, max_size=12)
    | st.sampled_from(["<script>x</script>", '"><img src=x onerror=y>', "{{ 7 * 7 }}", "$\\x$"])
)
def test_no_text_of_a_run_is_trusted(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("page")

    def all_tags(text: str) -> list[str]:
        run = shown(
            f"run {text}", about={text: text}, provenance={text: text}, rows=(text, text), notes=(text,),
            cards=(Card(text, text, text),), samples={text: pixels(2, 1, 4, 4)}, curves={},
            figures=(Figures(text, {text: text}, {text: text}, (text,)),), checkpoints=({text: text},),
            recipe={text: text}, command=f"x{text}", nearest=None, semantics=None,
        )  # fmt: skip
        page = page_of(run, shown("other", curves={}), title=text, lead=text, differing={text: (text, text)})
        tags = Tags()
        tags.feed(written(folder, page))
        return tags.seen

    assert all_tags(text) == all_tags("quiet")


def test_a_page_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write"):
        written(tmp_path / "missing", page_of(shown("SiT", curves={})))


def test_curves_survive_what_a_log_may_hold() -> None:
    lines = [{"step": i, "loss": value} for i, value in enumerate([1.0, 1e300, "high", None, True, -2, 0.0])]
    found = curves(lines, ["loss", "other"])
    assert found == {"loss": [(0, 1.0), (4, 1.0), (5, -2.0), (6, 0.0)]}
    svg = as_svg([{"$\\frac$ <b>": [(i, 1.0 + i) for i in range(5000)]}, {}])
    assert len(svg) < 100_000
    assert "<b>" not in svg
    assert as_svg([{}]) == ""


def test_a_preview_stands_beside_its_curves() -> None:
    preview = pixels(20, 30)
    assert beside_preview({}, preview) is preview
    whole = beside_preview({"loss": [(1, 2.0)]}, preview)
    assert whole.dtype == np.uint8
    factor = next(n for n in range(1, 100) if (n + 1) * 20 > whole.shape[0])
    assert whole.shape[1] > factor * 30
    assert (whole[: factor * 20 : factor, -factor * 30 - 24 : -24 : factor] == preview).all()
