"""The HTML report: what is in it, that nothing breaks out of it, and that a browser shows it without a network."""

import configparser
import html.parser
import pathlib
import re

import jinja2
import jinja2.meta
import numpy as np
import pytest
from browsers import AXE, barriers, browser, console, fetched, pixels

from lcrf_jax.pictures import report

NAMES = ("background", "cat", "<b>dog</b>")
EVIL = '"><script>alert(1)</script><img src=http://example.com/x.png>.jpg'
ODD = """a "b" 'c' <d> &amp; {{ e }}\nf</script>"""


def sample(name="a photograph.jpg", **layers):
    image = np.full((40, 60, 3), (250, 0, 0), np.uint8)
    layers = layers or {"truth": np.full((40, 60), 2), "prediction": np.full((40, 60), 1), "refined prediction": np.full((40, 60), 2)}
    return report.Sample(name, image, layers, "tags: cat", "Worst")


def whole_page():
    iou = {"network": [0.9, 0.5, np.nan], "refined": [0.95, None, 0.25]}
    return report.page("Run <1>", [
        ("Photographs", report.gallery([sample(), sample(EVIL)], NAMES)),
        ("IoU", report.bars(NAMES, {"": iou})),
        ("Confusion", report.confusion(NAMES, [[90, 10, 0], [5, 15, 0], [0, 0, 0]])),
        ("Training", report.curves({"loss": [(1, 2.0), (5, float("nan")), (9, 1.0)], "none": [(1, float("nan"))]}, marks=[5, 9])),
        ("Settings", report.settings({"data.root": EVIL, "seed": 0})),
        ("Table", report.table(["method", "mIoU"], [["ours", "61.0"]])),
    ], figures=[("mIoU", "61.0 %")], note="a & b")  # fmt: skip


UNCLOSED = {"meta", "link", "img", "input", "br", "path", "circle", "polyline"}


class Tags(html.parser.HTMLParser):
    """Counts tags and checks that they are closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in UNCLOSED:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in UNCLOSED:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_and_names_cannot_break_out_of_it():
    tags = Tags(whole_page())
    assert tags.open == []
    assert [tag for tag, _ in tags.found].count("script") == 1 and not [a for t, a in tags.found if t == "b" and a]
    for tag, attributes in tags.found:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    assert "default-src 'none'" in str(tags.found) and not re.search(r"https?://(?!example)", whole_page())
    assert "&lt;b&gt;dog&lt;/b&gt;" in whole_page() and "a &amp; b" in whole_page()


def odd_parts():
    """Every part with names that mean something in HTML, and how often they stand in its attributes and in its text."""
    names, labels = [ODD] * 2, {ODD: np.ones((4, 6), int)}
    yield report.gallery([report.Sample(ODD, np.zeros((4, 6, 3), np.uint8), labels, ODD, ODD)], names), 6, 7
    yield report.bars(names, {ODD: {ODD: [1, 0]}}), 3, 4
    yield report.confusion(names, np.eye(2)), 4, 4
    yield report.curves({ODD: [(1, 2.0)]}), 1, 1
    yield report.settings({ODD: ODD}), 0, 2
    yield report.table([ODD], [[ODD, ODD]]), 0, 3
    yield report.page(ODD, [(ODD, ODD), ("left out", "")], figures=[(ODD, ODD)], note=ODD), 0, 7


def test_a_name_is_read_as_it_was_written():
    for text, in_attributes, in_text in odd_parts():
        tags = Tags(text)
        assert tags.open == [] and not [tag for tag, _ in tags.found if tag == "d"]
        attributes = [value or "" for _, found in tags.found for value in found.values()]
        assert sum(ODD in value for value in attributes) == in_attributes, text
        assert sum(ODD in shown for shown in tags.texts) == in_text, text


def test_templates_use_what_they_are_given_and_miss_nothing():
    environment = report.templates("lcrf_jax.pictures")
    assert environment is report.templates("lcrf_jax.pictures")
    values = {"title": "x", "sections": [], "figures": [], "note": "x"}
    for file, used in (("report.html.jinja", set(values)), ("parts.html.jinja", set())):
        source, _, _ = environment.loader.get_source(environment, file)
        assert jinja2.meta.find_undeclared_variables(environment.parse(source)) == used
    for name in values:
        with pytest.raises(jinja2.UndefinedError, match=name):
            given = {other: values[other] for other in set(values) - {name}}
            environment.get_template("report.html.jinja").render(given)
    for part in ("curves", "bars", "confusion", "gallery", "settings", "table"):
        with pytest.raises(jinja2.UndefinedError):
            report._part(part)


def test_the_templates_are_shipped():
    config = configparser.ConfigParser()
    config.read(pathlib.Path(__file__).parents[2] / "setup.cfg")
    folder = pathlib.Path(report.__file__).parent
    shipped = set(folder.glob(config["options.package_data"]["lcrf_jax.pictures"]))
    assert shipped == {path for path in folder.rglob("*.*") if path.suffix not in (".py", ".pyc")}


def test_style_and_script_stand_in_the_page_as_in_their_files():
    folder = pathlib.Path(report.__file__).parent / "templates"
    for name in ("report.css", "report.js"):
        assert f">\n{(folder / name).read_text(encoding='utf-8')}</" in whole_page()


def test_numbers_of_the_page():
    text = whole_page()
    for shown in ("90.0", "50.0", "–", "25.0", "70.0", "60.0"):  # IoU in per cent, none, and the means .7 and .6
        assert f"<b>{shown}</b>" in text, shown
    assert 'title="cat called background: 5 pixels">25<' in text and 'title="background called cat: 10 pixels">10<' in text
    assert text.count("pixels\">–<") == 3  # of the class that the truth does not have
    assert text.count('<figure class="chart">') == 1 and "step 9: 1" in text and "step 5:" not in text
    assert text.count('class="mark"') == 1 and "a round ended at step 5" in text
    assert report.curves({}) == report.gallery([], NAMES) == report.bars(NAMES, {"": {}}) == ""


@pytest.mark.slow
def test_a_browser_shows_it_without_a_network(tmp_path):
    path = tmp_path / "report ä.html"
    path.write_text(whole_page(), encoding="utf-8")
    for width in (1200, 420):
        with browser(width) as page:
            page.get(path.as_uri())
            assert console(page) == [] and fetched(page) == [path.as_uri()]
            images = "return [...document.images].map(image => image.complete && image.naturalWidth > 0)"
            assert page.execute_script(images) == [True] * 8
            assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
            left, right = pixels(page, ".compare")
            assert left[0] > 200 and left[1] < 60 and right[1] > 60  # the photograph is red, class 2 green
            page.execute_script("""const slider = document.querySelector('.compare input');
                slider.value = 100; slider.dispatchEvent(new Event('input', {bubbles: true}))""")
            assert page.execute_script("return document.querySelector('.compare').style.getPropertyValue('--at')") == "100%"
            assert np.allclose(*pixels(page, ".compare"), atol=8)  # all photograph
            page.find_element("css selector", ".compare input").send_keys("\ue011")  # the key Home
            left, right = pixels(page, ".compare")
            assert left[1] > 60 and np.allclose(left, right, atol=8)  # all mask
            shown = "return [...document.querySelectorAll('.layer')].filter(layer => !layer.hidden).map(layer => layer.dataset.layer)"
            assert page.execute_script(shown) == ["photograph", "refined prediction"] * 2
            page.execute_script("document.querySelector('input[name=right][value=truth]').click()")
            assert page.execute_script(shown) == ["photograph", "truth"] * 2
            page.execute_script("document.querySelector('input[name=left][value=truth]').click()")
            assert page.execute_script(shown) == ["truth"] * 2
            left, right = pixels(page, ".compare")
            assert np.allclose(left, right, atol=8) and left[1] > 60  # the same on both sides
            page.execute_script("document.querySelector('input[name=left][value=prediction]').click()")
            assert [label.text for label in page.find_elements("css selector", ".card:first-child .side")] == ["prediction", "truth"]
            before = page.find_element("css selector", ".compare").size["width"]
            page.find_element("css selector", ".enlarge").send_keys("\ue007")  # the key Enter
            assert page.find_element("css selector", ".compare").size["width"] >= before * (1.5 if width > 1000 else 1)
            assert console(page) == []


@pytest.mark.slow
@pytest.mark.skipif(not AXE, reason="needs axe-core: LCRF_TEST_AXE=axe.min.js of the npm package")
def test_nothing_keeps_a_person_from_the_report(tmp_path):
    (tmp_path / "report.html").write_text(whole_page(), encoding="utf-8")
    with browser(400) as page:
        page.get((tmp_path / "report.html").as_uri())
        page.execute_script("document.querySelector('details').open = true")
        assert barriers(page) == []


@pytest.mark.parametrize("side", [10, 2000])
def test_pictures_are_small_whatever_the_photographs_are(side):
    image = np.zeros((side, side // 2, 3), np.uint8)
    text = report.gallery([report.Sample("x", image, {"prediction": np.zeros(image.shape[:2], np.uint8)})], NAMES)
    assert f"aspect-ratio:{min(side, report.PICTURE_SIDE) // 2}/{min(side, report.PICTURE_SIDE)}" in text
    assert len(text) < 30_000
