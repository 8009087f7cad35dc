"""The page for single photographs: requests, refusals, and a real upload in a headless browser."""

import base64
import io
import json
import pathlib
import re
import threading

import numpy as np
import pytest
from browsers import browser, console, fetched
from PIL import Image
from programs import run
from small_segmenter import NETWORK, SETTINGS, parameters, picture

from experiments import photograph_page
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
    return photograph_page.make_app(labeller, max_bytes=200_000, hosts=["localhost", "127.0.0.1"]).test_client()


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


@pytest.mark.parametrize("query, content, code, message", [
    ("", b"no photograph", 400, "no photograph that can be read"),
    ("", b"", 400, "no photograph that can be read"),
    ("", file_of(picture(0, 60, 60), "JPEG")[:200], 400, "no photograph that can be read"),
    ("", file_of(np.zeros((400, 300, 3), np.uint8)), 400, "300 x 400 pixels; at most 0 million"),
    ("", b"x" * 200_001, 413, "larger than 0 MB"),
    ("?bilateral_weight=x", file_of(picture(0, 9, 9)), 400, "weight of position and colour: expected 0 to 20, got 'x'"),
    ("?bilateral_weight=nan", file_of(picture(0, 9, 9)), 400, "expected 0 to 20"),
    ("?num_iterations=1000000", file_of(picture(0, 9, 9)), 400, "iterations of mean field: expected 5 to 20"),
    ("?tag=bird", file_of(picture(0, 9, 9)), 400, "unknown class 'bird'"),
])  # fmt: skip
def test_what_is_refused(client, query, content, code, message):
    ended = client.post(f"/segment{query}", data=content, headers=OWN, base_url=HOME)
    assert ended.status_code == code and message in ended.get_json()["error"]


def test_other_pages_and_other_hosts_cannot_use_it(client):
    image = file_of(picture(0, 9, 9))
    assert client.post("/segment", data=image, base_url=HOME).status_code == 403
    assert client.get("/", base_url="http://example.com").status_code == 400
    assert client.get("/nothing", base_url=HOME).status_code == 404
    shown = client.get("/", base_url=HOME)
    assert shown.status_code == 200 and "default-src 'none'" in shown.headers["Content-Security-Policy"]
    assert shown.headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_is_one_file_with_every_name_escaped(client):
    text = client.get("/", base_url=HOME).get_data(as_text=True)
    [facts] = re.findall(r'<script type="application/json" id="facts">(.*)</script>', text)
    assert json.loads(facts)["classes"] == NAMES[1:] and not set("<>&'") & set(facts)
    assert text.count("a, b, &lt;/script&gt;&lt;b&gt;c&lt;/b&gt; &#34;&amp;amp;&#34; &#39;\n</") == 2  # title and heading
    assert text.count("</script>") == 2 and not re.search("src=|href=\"(?!data:)|@import|url\\(|{[{%]|[%}]}\n<", text)
    folder = pathlib.Path(photograph_page.__file__).parent / "templates"
    for name in ("photograph_page.css", "photograph_page.js"):
        assert f">\n{(folder / name).read_text(encoding='utf-8')}</" in text


def test_a_photograph_is_uploaded_in_a_browser(labeller, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a photo.jpg").write_bytes(file_of(picture(3, 70, 50), "JPEG", exif=exif))  # shown 50 high, 70 wide
    server, address = photograph_page.make_server(labeller, host="127.0.0.1", port=0, max_bytes=1_000_000)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    from selenium.webdriver.support.ui import WebDriverWait

    try:
        with browser() as page:
            page.get(address)
            assert "a, b" in page.title and console(page) == []
            status = page.find_element("id", "status")

            def wait(condition):
                return WebDriverWait(page, 120).until(lambda _: condition())

            page.find_element("id", "file").send_keys(str(tmp_path / "a photo.jpg"))
            wait(lambda: "a photo.jpg: " in status.text)
            size = "const shown = document.getElementById('picture'); return [shown.naturalWidth, shown.naturalHeight]"
            wait(lambda: page.execute_script(size) == [70, 50])
            rows = [row.text for row in page.find_elements("css selector", "#classes tr")]
            assert rows and all(row.count("%") == 2 for row in rows)
            before = page.find_element("id", "picture").get_attribute("src")
            for view in ("mask", "confidence", "photograph", "overlay"):
                page.find_element("css selector", f"[data-view={view}]").click()
                assert page.execute_script(size) == [70, 50]
            page.execute_script("""const slider = document.querySelector('input[name=bilateral_weight]');
                slider.value = 0; slider.dispatchEvent(new Event('input', {bubbles: true}))""")
            wait(lambda: page.find_element("id", "picture").get_attribute("src") != before)
            page.find_element("css selector", "#tags input").click()
            wait(lambda: "tags used" in status.text)
            assert console(page) == [] and {url.split("?")[0] for url in fetched(page)} == {f"{address}/", f"{address}/segment"}
            (tmp_path / "broken.jpg").write_text("no photograph")
            page.find_element("id", "file").send_keys(str(tmp_path / "broken.jpg"))
            wait(lambda: "no photograph that can be read" in status.text)
    finally:
        server.shutdown()


def test_the_program_tells_of_a_missing_run(tmp_path):
    ended = run("demo", f"--checkpoint={tmp_path}")
    assert ended.code == 1 and "expected a run folder with config.json" in ended.err
