import numpy as np
import pytest
from PIL import Image

from lcrf_jax.pictures.palette import overlay, palette, picture_grid, picture_table, save_index_png

NAMES = ("background", "cat", "dog")


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def square(height, width, label=1):
    labels = np.zeros((height, width), np.uint8)
    labels[height // 4:-height // 4, width // 4:-width // 4] = label
    return labels


def test_the_palette_is_the_one_of_voc():
    colours = palette(256)
    assert colours.dtype == np.uint8 and colours.shape == (256, 3)
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0),
             15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    for label, colour in known.items():
        assert tuple(colours[label]) == colour
    assert len(np.unique(colours, axis=0)) == 256
    np.testing.assert_array_equal(palette(21), colours[:21])
    for bad in (0, 257):
        with pytest.raises(ValueError, match="num_classes in 1..256"):
            palette(bad)


def test_overlay_by_hand():
    image = np.full((4, 6, 3), 100, np.uint8)
    labels = np.zeros((4, 6), np.int64)
    labels[:, 3:] = 1
    drawn = overlay(image, labels, alpha=0.5)
    assert drawn.dtype == np.uint8
    np.testing.assert_array_equal(drawn[:, :3], 100)
    np.testing.assert_array_equal(drawn[:, 3], np.broadcast_to([86, 180, 233], (4, 3)))
    np.testing.assert_array_equal(drawn[:, 4:], np.broadcast_to([93, 140, 166], (4, 2, 3)))
    np.testing.assert_array_equal(image, 100)


def test_overlay_without_objects_and_without_colour():
    image = picture(9, 7)
    np.testing.assert_array_equal(overlay(image, np.zeros((9, 7), int)), image)
    np.testing.assert_array_equal(overlay(image, np.full((9, 7), 2), alpha=0), image)
    assert overlay(picture(1, 1), np.ones((1, 1), int)).shape == (1, 1, 3)


@pytest.mark.parametrize(("image", "labels", "message"), [
    (picture(4, 6), np.zeros((6, 4), int), r"image's size \(4, 6\), got \(6, 4\)"),
    (picture(4, 6) / 255.0, np.zeros((4, 6), int), "of uint8, got .* float64"),
    (picture(4, 6)[..., 0], np.zeros((4, 6), int), r"expected an image \[H, W, 3\]"),
    (picture(4, 6), np.zeros((4, 6)), "of integers, got .* float64; take the argmax"),
    (picture(4, 6), np.full((4, 6), -1), r"labels in 0\.\.255, got -1"),
])
def test_overlay_refuses_other_arrays(image, labels, message):
    with pytest.raises(ValueError, match=message):
        overlay(image, labels)


def test_a_mask_comes_back_from_its_png(tmp_path):
    labels = np.random.default_rng(0).integers(0, 256, (11, 5))
    save_index_png(tmp_path / "mask.png", labels)
    with Image.open(tmp_path / "mask.png") as read:
        assert read.mode == "P"
        np.testing.assert_array_equal(np.asarray(read), labels)
        np.testing.assert_array_equal(np.asarray(read.convert("RGB")), palette(256)[labels])
    with pytest.raises(ValueError, match=r"labels in 0\.\.255, got .*256"):
        save_index_png(tmp_path / "mask.png", np.full((2, 2), 256))


def test_the_grid_has_a_column_for_what_there_is(tmp_path):
    rows = [(picture(40, 60), square(40, 60), square(40, 60, 2), None),
            (picture(60, 30), None, square(60, 30), None)]
    path = picture_grid(rows, tmp_path / "new" / "grid.png", class_names=NAMES, cell=100)
    three = np.asarray(Image.open(path))
    assert three.shape[1] == 3 * 100 + 4 * 8
    refined = [(*row[:3], row[2]) for row in rows]
    four = picture_grid(refined, tmp_path / "four.png", class_names=NAMES, cell=100)
    assert Image.open(four).size[0] == 4 * 100 + 5 * 8
    colours = {tuple(colour) for colour in three.reshape(-1, 3)}
    assert (230, 159, 0) in colours and (86, 180, 233) in colours
    only_cat = picture_grid(rows[1:], tmp_path / "cat.png", class_names=NAMES, cell=100)
    legend = np.asarray(Image.open(only_cat))[-32:]
    assert (legend == (86, 180, 233)).all(axis=-1).any() and not (legend == (230, 159, 0)).all(axis=-1).any()


def test_the_picture_in_the_grid_is_the_image(tmp_path):
    image = picture(50, 50)
    rows = [(image, None, square(50, 50), None)]
    path = picture_grid(rows, tmp_path / "grid.png", class_names=NAMES, cell=50)
    np.testing.assert_array_equal(np.asarray(Image.open(path))[34:84, 8:58], image)


def test_the_legend_breaks_into_lines_and_extremes_are_drawn(tmp_path):
    names = tuple(f"a long class name {k}" for k in range(40))
    labels = np.arange(40).repeat(40).reshape(40, 40)
    rows = [(picture(40, 40), labels, labels, None), (picture(1, 300), None, np.full((1, 300), 255), None)]
    tall = Image.open(picture_grid(rows, tmp_path / "grid.png", class_names=names, cell=120))
    assert tall.size[1] > 34 + 120 + 20 * 24


def test_the_grid_refuses_other_rows(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        picture_grid([], tmp_path / "grid.png", class_names=NAMES)
    with pytest.raises(ValueError, match=r"labels in 0\.\.2 or 255, got \[3\]"):
        picture_grid([(picture(8, 8), None, square(8, 8, 3), None)], tmp_path / "grid.png", class_names=NAMES)
    with pytest.raises(ValueError, match=r"masks of the image's size \(8, 9\), got \(9, 8\)"):
        picture_grid([(picture(8, 9), None, square(9, 8), None)], tmp_path / "grid.png", class_names=NAMES)


def test_a_table_has_a_column_for_each_title(tmp_path):
    rows = [(picture(30, 40), square(30, 40), None, square(30, 40, 2), np.full((30, 40), 255, np.uint8))] * 2
    titles = ["image", "truth", "one", "two", "three"]
    path = picture_table(rows, tmp_path / "table.png", titles=titles, class_names=NAMES, cell=60)
    with Image.open(path) as drawn:
        assert drawn.width == 8 + 5 * 68
        cells = [np.asarray(drawn)[34:34 + 45, 8 + 68 * at:68 * at + 68].astype(int) for at in range(5)]
    colours = [tuple(cell[22, 30]) for cell in cells]
    assert len(set(colours)) == 5, "image, a cat, nothing, a dog and void look different"
