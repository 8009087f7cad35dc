"""The page for single photographs: its answers, and real uploads in a headless browser."""

import base64
import contextlib
import io
import json
import pathlib
import re
import threading

import numpy as np
import pytest
from browsers import AXE, barriers, browser, console, fetched
from PIL import Image
from programs import run
from small_segmenter import NETWORK, SETTINGS, parameters, picture

from experiments import photograph_page, photograph_server
from lcrf_jax.predict.segmenter import make_segmenter, segment

NAMES = ["background", "a", "b", "</script><b>c</b> \"&amp;\" '\n"]
DESCRIPTION = {"network": NETWORK, "class_names": NAMES, "inference": SETTINGS}
OWN = {"X-Requested-With": "lcrf_jax"}
HOME = "http://localhost"


@pytest.fixture(scope="module")
def labeller():
    return photograph_page.Labeller(DESCRIPTION, parameters(), max_pixels=100_000)


@pytest.fixture(scope="module")
def client(labeller):
    return photograph_server.make_app(labeller, max_bytes=200_000).test_client()


def file_of(image, kind="PNG", **options):
    content = io.BytesIO()
    Image.fromarray(image).save(content, kind, **options)
    return content.getvalue()


def picture_of(url):
    return Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1])))


@pytest.mark.slow_except("[?]crf=0-False")
@pytest.mark.parametrize("query, crf", [("", True), ("?crf=1", True), ("?crf=0", False)])
def test_the_answer_is_what_the_library_says(client, query, crf):
    image = picture(3, 50, 70)
    got = client.post(f"/segment{query}", data=file_of(image), headers=OWN, base_url=HOME).get_json()
    expected = segment(make_segmenter(DESCRIPTION, parameters()), image, crf=crf)
    np.testing.assert_array_equal(picture_of(got["mask"]), expected.labels)
    assert picture_of(got["overlay"]).size == picture_of(got["confidence"]).size == picture_of(got["photograph"]).size == (70, 50)
    areas = {entry["name"]: entry["area"] for entry in got["classes"]}
    assert areas == {DESCRIPTION["class_names"][k]: pytest.approx((expected.labels == k).mean()) for k in np.unique(expected.labels)}
    assert all(0.25 <= entry["confidence"] <= 1 for entry in got["classes"])


@pytest.mark.slow
def test_sliders_and_tags_change_what_they_should(client):
    image = picture(3, 50, 70)

    def mask(query):
        return np.asarray(picture_of(client.post(f"/segment?{query}", data=file_of(image), headers=OWN, base_url=HOME).get_json()["mask"]))

    for values in ({"unary_weight": 2.0, "num_iterations": 5}, {"bilateral_weight": 1.0, "bilateral_colour_width": 30.0}):
        inference = {**SETTINGS, "kernel": {**SETTINGS["kernel"], **{k: v for k, v in values.items() if k.startswith("bilateral")}},
                     **{k: v for k, v in values.items() if not k.startswith("bilateral")}}  # fmt: skip
        expected = segment(make_segmenter({**DESCRIPTION, "inference": inference}, parameters()), image, crf=True).labels
        found = mask("&".join(f"{name}={value}" for name, value in values.items()))
        assert (found == expected).mean() > 0.999
    assert set(np.unique(mask("tag=a"))) <= {0, 1} and set(np.unique(mask("tag=a&tag=b"))) <= {0, 1, 2}
    assert not (mask("") == mask("bilateral_weight=0&gaussian_weight=0")).all()


def test_the_page_is_one_file_with_every_name_escaped(client):
    text = client.get("/", base_url=HOME).get_data(as_text=True)
    [facts] = re.findall(r'<script type="application/json" id="facts">(.*)</script>', text)
    assert json.loads(facts)["classes"] == NAMES[1:] and not set("<>&'") & set(facts)
    assert text.count("a, b, &lt;/script&gt;&lt;b&gt;c&lt;/b&gt; &#34;&amp;amp;&#34; &#39;\n</") == 2  # title and heading
    assert text.count("</script>") == 2 and not re.search("src=|href=\"(?!data:)|@import|url\\(|{[{%]|[%}]}\n<", text)
    folder = pathlib.Path(photograph_page.__file__).parent / "templates"
    for name in ("photograph_page.css", "photograph_page.js"):
        assert f">\n{(folder / name).read_text(encoding='utf-8')}</" in text


@pytest.mark.parametrize("size", [(1, 1), (1, 64), (64, 64)])
def test_photographs_of_any_size_are_answered(client, size):
    got = client.post("/segment?crf=0", data=file_of(picture(3, 64, 64)[: size[0], : size[1]]), headers=OWN, base_url=HOME).get_json()
    assert picture_of(got["mask"]).size == picture_of(got["overlay"]).size == size[::-1] and got["note"] == ""


def test_an_unfit_output_is_told(client, labeller, monkeypatch):
    def diverged(*_, **__):
        raise ValueError("the network's output is not a number; use another checkpoint")

    monkeypatch.setattr(photograph_page, "segment", diverged)
    ended = client.post("/segment", data=file_of(picture(3, 9, 9)), headers=OWN, base_url=HOME)
    assert ended.status_code == 500 and "use another checkpoint; the window that runs it says more" in ended.get_json()["error"]
    monkeypatch.undo()
    assert client.post("/segment?crf=0", data=file_of(picture(3, 64, 64)), headers=OWN, base_url=HOME).status_code == 200


@contextlib.contextmanager
def served(labeller, examples=()):
    """The address of a server of the page."""
    listener = photograph_server.listening("127.0.0.1", 0)
    server = photograph_server.make_server(photograph_server.make_app(labeller, max_bytes=300_000, examples=examples), listener)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield photograph_server.addresses(*listener.getsockname())[0]
    finally:
        server.shutdown()
        server.server_close()
        listener.close()


class Shown:
    """The page in a browser."""

    def __init__(self, page):
        self.page, self.status = page, page.find_element("id", "status")

    def wait(self, condition, seconds=120):
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.page, seconds, poll_frequency=0.05).until(lambda _: condition())

    def choose(self, path):
        self.page.find_element("id", "file").send_keys(str(path))

    def source(self):
        return self.page.find_element("id", "picture").get_attribute("src")

    def size(self):
        return self.page.execute_script(
            "const shown = document.getElementById('picture'); return [shown.naturalWidth, shown.naturalHeight]"
        )

    def result_is_hidden(self):
        return not self.page.find_element("id", "shown").is_displayed() and not self.source()


@pytest.mark.slow
def test_a_photograph_is_uploaded_in_a_browser(labeller, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a photo.jpg").write_bytes(file_of(picture(3, 70, 50), "JPEG", exif=exif))  # shown 50 high, 70 wide
    with served(labeller) as address, browser() as page:
        page.get(address)
        assert "a, b" in page.title and console(page) == []
        shown = Shown(page)
        shown.choose(tmp_path / "a photo.jpg")
        shown.wait(lambda: re.search(r"a photo.jpg: [\d.]+ s", shown.status.text))
        shown.wait(lambda: shown.size() == [70, 50])
        rows = [row.text for row in page.find_elements("css selector", "#classes tr")]
        assert rows and all(row.count("%") == 2 for row in rows)
        for name, end in (("mask", "a photo.png"), ("overlay", "a photo_overlay.jpg")):
            link = page.find_element("id", f"save_{name}")
            assert link.get_attribute("download") == end
            assert picture_of(link.get_attribute("href")).size == (70, 50)
        assert picture_of(page.find_element("id", "save_mask").get_attribute("href")).mode == "P"
        before = shown.source()
        for view in ("mask", "confidence", "photograph", "overlay"):
            page.find_element("css selector", f"[data-view={view}]").click()
            shown.wait(lambda: shown.size() == [70, 50])
        page.execute_script("""const slider = document.querySelector('input[name=bilateral_weight]');
            slider.value = 0; slider.dispatchEvent(new Event('input', {bubbles: true}))""")
        shown.wait(lambda: shown.source() != before)
        page.find_element("css selector", "#tags input").click()
        shown.wait(lambda: "tags used" in shown.status.text)
        assert console(page) == [] and {url.split("?")[0] for url in fetched(page)} == {f"{address}/", f"{address}/segment"}


@pytest.mark.slow
def test_an_example_is_taken_and_shown_until_it_is_segmented(labeller, tmp_path, monkeypatch):
    (tmp_path / "café 1.jpg").write_bytes(file_of(picture(3, 50, 70), "JPEG"))
    (tmp_path / "broken.jpg").write_bytes(b"no photograph")
    examples = photograph_page.examples_of(tmp_path, max_bytes=300_000, max_pixels=10_000)
    assert [example.name for example in examples] == ["café 1.jpg"]
    answer, go_on = labeller.answer, threading.Event()
    monkeypatch.setattr(labeller, "answer", lambda *given, **named: go_on.wait(60) and answer(*given, **named))
    with served(labeller, examples) as address, browser() as page:
        page.get(address)
        shown = Shown(page)
        page.find_element("css selector", ".examples button").click()
        shown.wait(lambda: shown.size() == [70, 50])
        assert page.find_element("id", "shown").get_attribute("class") == "busy" and shown.source().startswith("blob:")
        go_on.set()
        shown.wait(lambda: re.search(r"café 1.jpg: [\d.]+ s", shown.status.text))
        assert not page.find_element("id", "shown").get_attribute("class") and shown.source().startswith("data:")
        assert console(page) == []


@pytest.mark.slow
@pytest.mark.skipif(not AXE, reason="needs axe-core: LCRF_TEST_AXE=axe.min.js of the npm package")
def test_nothing_keeps_a_person_from_the_page(labeller, tmp_path):
    (tmp_path / "photo.png").write_bytes(file_of(picture(3, 50, 70)))
    with served(labeller, photograph_page.examples_of(tmp_path, max_bytes=300_000, max_pixels=10_000)) as address, browser() as page:
        page.get(address)
        shown = Shown(page)
        page.find_element("css selector", "summary").click()
        shown.choose(tmp_path / "photo.png")
        shown.wait(lambda: re.search(r"photo.png: [\d.]+ s", shown.status.text))
        assert barriers(page) == []


def test_what_is_no_folder_of_photographs(tmp_path):
    (tmp_path / "large.png").write_bytes(file_of(picture(3, 50, 70)))
    for folder, why in ((tmp_path / "none", "there is no photograph"), (tmp_path, "large.png: it has more than")):
        with pytest.raises(ValueError, match=f"--examples: expected a folder of photographs.*{why}"):
            photograph_page.examples_of(folder, max_bytes=100, max_pixels=10_000)
    assert photograph_page.examples_of("", max_bytes=1, max_pixels=1) == []


@pytest.mark.slow
def test_an_error_never_stands_above_the_result_of_another_photograph(labeller, tmp_path):
    good = tmp_path / "good.png"
    good.write_bytes(file_of(picture(3, 64, 64)))
    bad = {"broken.jpg": (b"no photograph", "no photograph that can be read"), "empty.jpg": (b"", "the file is empty"),
           "large.jpg": (b"x" * 300_001, "more than 0.3: scale the photograph down"),
           "cut.jpg": (file_of(picture(0, 60, 60), "JPEG")[:700], "damaged or cut short"),
           "wide.png": (file_of(np.zeros((2, 70_000, 3), np.uint8)), "70000 x 2 pixels")}  # fmt: skip
    with served(labeller) as address, browser() as page:
        page.get(address)
        shown = Shown(page)
        page.find_element("id", "crf").click()
        for name, (content, message) in bad.items():
            shown.choose(good)
            shown.wait(lambda: re.search(r"good.png: [\d.]+ s", shown.status.text) and shown.size() == [64, 64])
            (tmp_path / name).write_bytes(content)
            shown.choose(tmp_path / name)
            shown.wait(lambda name=name: name in shown.status.text and shown.result_is_hidden())
            shown.wait(lambda message=message: message in shown.status.text)
            assert name in shown.status.text and "error" in shown.status.get_attribute("class") and shown.result_is_hidden()
        shown.choose(good)
        shown.wait(lambda: shown.size() == [64, 64])
        # Of a program that has ended, and of a proxy that does not reach it; other settings of the same photograph.
        for answer, message in (("Promise.reject(new TypeError('Failed to fetch'))", "the photograph could not be sent: the program behind the page has ended"),
                                ("Promise.resolve(new Response('<html>', {status: 502}))", "the program behind the page answered 502")):
            page.execute_script(f"window.fetch = () => {answer}; document.querySelector('#tags input').click()")
            shown.wait(lambda message=message: f"good.png: {message}" in shown.status.text)
            assert shown.result_is_hidden()


@pytest.mark.slow
def test_the_answer_of_an_older_photograph_never_replaces_the_newer(labeller, tmp_path, monkeypatch):
    for name, height in (("slow.png", 40), ("middle.png", 48), ("fast.png", 64)):
        (tmp_path / name).write_bytes(file_of(picture(3, height, 64)))
    answer, release, ended = labeller.answer, threading.Event(), threading.Event()

    def delayed(content, *arguments, **settings):
        got = answer(content, *arguments, **settings)
        if Image.open(io.BytesIO(content)).height == 40:
            release.wait(60)
            ended.set()
        return got

    monkeypatch.setattr(labeller, "answer", delayed)
    with served(labeller) as address, browser() as page:
        page.get(address)
        shown = Shown(page)
        page.find_element("id", "crf").click()
        for name in ("slow.png", "middle.png", "fast.png"):
            shown.choose(tmp_path / name)
        shown.wait(lambda: re.search(r"fast.png: [\d.]+ s", shown.status.text) and shown.size() == [64, 64])
        release.set()
        assert ended.wait(60)
        page.execute_async_script("setTimeout(arguments[0], 500)")
        assert "fast.png" in shown.status.text and shown.size() == [64, 64]


def test_the_program_tells_of_a_missing_run(tmp_path):
    ended = run("demo", f"--checkpoint={tmp_path}", "--port=0")
    assert ended.code == 1 and "expected a run folder with config.json" in ended.err
