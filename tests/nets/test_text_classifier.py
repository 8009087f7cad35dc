"""The tag classifier of texts: its file, its projection, and its numbers."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from lcrf_jax.nets import weights
from lcrf_jax.nets.text_classifier import SCALE, read_texts, text_classifier
from lcrf_jax.nets.weights import check_projection, image_projection

NAMES = ("background", "cat", "potted plant")
VECTORS = {"cat": np.float32([3, 4, 0]), "potted plant": np.float32([0, 0, 2]), "wall": np.float32([0, 5, 0])}


def texts_file(folder, vectors=VECTORS):
    np.savez(folder / "texts.npz", **vectors)
    return folder / "texts.npz"


def test_vectors_are_read_by_the_names_of_the_classes_in_their_order(tmp_path):
    texts = read_texts(texts_file(tmp_path), NAMES)
    np.testing.assert_allclose(texts.classes, [[0.6, 0.8, 0], [0, 0, 1]], rtol=1e-6)
    np.testing.assert_allclose(texts.others, [[0, 1, 0]])
    assert texts.other_names == ("wall",)
    again = read_texts(texts_file(tmp_path, {name: VECTORS[name] for name in ("potted plant", "cat")}), NAMES)
    assert again.others.shape == (0, 3) and again.other_names == ()


@pytest.mark.parametrize(("vectors", "names", "message"), [
    ({"cats": [1.0, 2], "dog": [1.0, 0]}, ("background", "cat", "dog"),
     r"texts.npz: no vector for 1 of 2 classes: 'cat'.*; beside them it has cats"),
    ({"wall": [1.0, 2]}, NAMES, r"no vector for 2 of 2 classes: 'cat', 'potted plant'; beside them it has wall"),
    ({"cat": [1.0, 2], "potted plant": [1.0, 2, 3]}, NAMES, r"got 'potted plant' \[3\]"),
    ({"cat": [[1.0, 2]], "potted plant": [[1.0, 2]]}, NAMES, r"got 'cat' \[1, 2\], 'potted plant' \[1, 2\]"),
    ({"cat": [1.0, np.nan], "potted plant": [0.0, 0]}, NAMES, "finite numbers that are not all 0, got others for 'cat', 'potted plant'"),
    ({"cat": [1.0, 2]}, NAMES[:2], "one text tells nothing apart; add others"),
    ({"cat": ["a", "b"], "potted plant": ["a", "b"]}, NAMES, "expected a .npz with one vector for each class name"),
])
def test_a_file_that_cannot_be_used_is_told_with_the_names(tmp_path, vectors, names, message):
    with pytest.raises(ValueError, match=message):
        read_texts(texts_file(tmp_path, {name: np.array(vector) for name, vector in vectors.items()}), names)


def test_no_file_and_another_kind_of_file_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"classifier.text_embeddings: there is no file .*none.npz; give a .npz with one vector"):
        read_texts(tmp_path / "none.npz", NAMES)
    (tmp_path / "texts.npz").write_bytes(b"cat 1 2 3")
    with pytest.raises(ValueError, match="cannot read it as one"):
        read_texts(tmp_path / "texts.npz", NAMES)
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(ValueError, match="cannot read it as one"):
        read_texts(tmp_path / "one.npy", NAMES)


def test_logits_are_scaled_cosines_less_what_all_texts_have_in_common(tmp_path):
    """For one image they are the cosines of its own, less those with the mean of all texts, also those of no class."""
    rng = np.random.default_rng(0)
    projection, pooled = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(1, 5)).astype(np.float32)
    texts = read_texts(texts_file(tmp_path), NAMES)
    classifier = text_classifier(projection, texts, pooled)
    image = pooled[0] @ projection
    unit = [vector / np.linalg.norm(vector) for vector in VECTORS.values()]
    cosines = [vector @ image / np.linalg.norm(image) for vector in unit]
    expected = SCALE * (np.array(cosines[:2]) - np.mean(cosines))
    np.testing.assert_allclose((pooled @ classifier.weights + classifier.bias)[0], expected, rtol=1e-4)
    both = np.concatenate([pooled, 3 * pooled])  # of mean length 2
    np.testing.assert_allclose(text_classifier(projection, texts, both).weights, classifier.weights / 2, rtol=1e-5)
    with pytest.raises(ValueError, match="expected vectors of 4 numbers, got 3; make them with the text tower of the same CLIP"):
        text_classifier(np.ones((5, 4)), texts, pooled)


@pytest.mark.parametrize("name", ["visual_projection.weight", "head.weight"])
def test_the_projection_is_that_of_the_file(tmp_path, name):
    array = np.arange(4 * 768, dtype=np.float32).reshape(4, 768)
    save_file({name: array, "head.bias": np.zeros(4, np.float32)}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(image_projection("clip_vitb16", str(tmp_path / "model.safetensors")), array.T)


def test_a_backbone_or_a_file_without_one_is_refused(tmp_path):
    for name in ("dinov2_vits14", "small", "efficientnet_lite0"):
        with pytest.raises(ValueError, match=rf"trained beside texts \(clip_vitb16\), got '{name}'"):
            check_projection(name)
    assert [name for name, published in weights.PUBLISHED.items() if published.projections] == ["clip_vitb16"]
    save_file({"head.weight": np.zeros((4, 5), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"or head.weight of \[D, 768\], found one of \[4, 5\]; a file of the image tower alone"):
        image_projection("clip_vitb16", str(tmp_path / "model.safetensors"))
    save_file({"norm.weight": np.zeros(768, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="found neither"):
        image_projection("clip_vitb16", str(tmp_path / "model.safetensors"))
    assert image_projection("clip_vitb16", "random").shape == (768, 512)
