"""What the front page says can be typed, can be typed, and the page of faults names tests that are there."""

import re

import numpy as np
import pytest
from pages import PAGES, ROOT, blocks, run_block, run_page


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_the_example_of_the_dense_crf_runs_as_printed():
    _, code = blocks("README.md")
    names = {}
    run_block(code, names, "README.md")
    bright = names["image"][:, :, 0] == 200
    assert bright.sum() == 1200 and ((names["probs"].argmax(-1) == 1) != bright).mean() > 0.25
    np.testing.assert_array_equal(names["labels"], bright)


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_the_library_example_runs():
    """The gradient descends on the tags: background and class 2 are tagged."""
    names = run_page("docs/how.md")
    assert names["gradient"].shape == (576, 4) and np.isfinite(names["gradient"]).all()
    descent = -names["gradient"].sum(axis=0)
    assert descent[0] > 0 and descent[2] > 0 and descent[1] < 0 and descent[3] < 0
    assert names["labels"].shape == (576,)


def test_every_fault_of_the_page_has_a_test():
    defined = {name for path in (ROOT / "tests").rglob("test_*.py")
               for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)}  # fmt: skip
    faults = PAGES["docs/faults.md"]
    faults = faults[: faults.index("\n## What it costs")]
    rows = [line for line in faults.splitlines() if line.startswith("| ") and not line.startswith("| fault |")]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named and set(named) <= defined, row
