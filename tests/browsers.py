"""A headless browser for the tests of pages; where there is none they are skipped and say why."""

import contextlib
import json
import os
import pathlib
import shutil

import pytest

AXE = os.environ.get("LCRF_TEST_AXE", "")  # a file; axe-core finds what keeps people from a page


@contextlib.contextmanager
def browser(width=1200, height=1600):
    """A Chromium without a window; it logs what it fetches and what goes wrong."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    from selenium.webdriver.chrome.service import Service

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs Chromium and ChromeDriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    page = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield page
    finally:
        page.quit()


def console(page):
    """What the page wrote to the console, errors among it."""
    return [entry["message"] for entry in page.get_log("browser")]


def fetched(page):
    """Addresses that the page asked for; data URLs are no requests."""
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("data:", "blob:"))]


def pixels(page, selector):
    """Mean colours of the left and the right half of an element, as they are shown."""
    import io

    import numpy as np
    from PIL import Image

    picture = np.asarray(Image.open(io.BytesIO(page.find_element("css selector", selector).screenshot_as_png)).convert("RGB"))
    middle = picture.shape[1] // 2
    return picture[:, 4 : middle - 4].mean(axis=(0, 1)), picture[:, middle + 4 : -4].mean(axis=(0, 1))


def barriers(page):
    """What axe-core finds serious or critical in the page as it is shown: (rule, elements)."""
    page.execute_script(pathlib.Path(AXE).read_text(encoding="utf-8"))
    found = page.execute_async_script("const done = arguments[0]; axe.run().then(result => done(result.violations))")
    return [(each["id"], [node["html"][:120] for node in each["nodes"]]) for each in found if each["impact"] in ("serious", "critical")]
