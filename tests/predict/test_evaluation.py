"""Scores: every pixel that is not void is counted once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcrf_jax.data.example import Example
from lcrf_jax.data.parts import in_parts
from lcrf_jax.machine.errors import UserError
from lcrf_jax.metrics import mean_iou
from lcrf_jax.predict import evaluation
from lcrf_jax.predict.segmenter import Segmenter


class Flat:
    """Images of one grey level each: level 10 k is class k to the segmenter below."""

    split = "val"

    def __init__(self, labels, masks):
        self._labels, self._masks = labels, masks

    @property
    def names(self):
        return [str(index) for index in range(len(self))]

    def __len__(self):
        return len(self._labels)

    def __getitem__(self, index):
        mask = self._masks[index]
        image = np.full((*mask.shape, 3), 10 * self._labels[index], np.uint8)
        return Example(str(index), image, np.arange(3) == 0, mask)


class Vanishing(Flat):
    """The last image is there when the files are looked at, and gone when it is read."""

    def __getitem__(self, index):
        if index == len(self) - 1:
            raise self.fault
        return super().__getitem__(index)


def grey_level_segmenter():
    def network_log_probs(images):
        return jnp.log(jax.nn.one_hot(images[:, :1, :1, 0] // 10, 3) + 0.01)

    def enlarge(log_probs, rows, columns):
        return jnp.broadcast_to(log_probs, (len(rows), len(columns), 3))

    def refine(log_probs, image, valid):
        return jnp.roll(log_probs, 1, axis=-1)  # class k becomes k + 1

    return Segmenter(("background", "a", "b"), (4,), lambda images: images, network_log_probs, enlarge, refine)


def confusion_by_hand(labels, masks):
    counts = np.zeros((3, 3), int)
    for label, mask in zip(labels, masks, strict=True):
        for truth in mask.ravel():
            if truth != 255:
                counts[truth, label] += 1
    return counts


@pytest.mark.parametrize("batch_size", [2, 5, 8])
def test_evaluate_counts_every_pixel_that_is_not_void(batch_size):
    rng = np.random.default_rng(0)
    labels = [0, 2, 1, 1, 0]
    masks = [rng.choice(np.uint8([0, 1, 2, 255]), (3 + i, 9 - i)) for i in range(5)]
    source = Flat(labels, masks)
    scores = evaluation.evaluate(grey_level_segmenter(), source, crf=False, batch_size=batch_size)
    np.testing.assert_array_equal(scores.plain, confusion_by_hand(labels, masks))
    assert scores.refined is None and scores.samples == []
    each = [mean_iou(confusion_by_hand([label], [mask])) for label, mask in zip(labels, masks, strict=True)]
    np.testing.assert_allclose(scores.image_scores, each, atol=1e-8)
    scores = evaluation.evaluate(grey_level_segmenter(), source, crf=True, num_samples=3, batch_size=batch_size)
    np.testing.assert_array_equal(scores.plain, confusion_by_hand(labels, masks))
    np.testing.assert_array_equal(scores.refined, confusion_by_hand([(k + 1) % 3 for k in labels], masks))
    each = [mean_iou(confusion_by_hand([(k + 1) % 3], [mask])) for k, mask in zip(labels, masks, strict=True)]
    np.testing.assert_allclose(scores.image_scores, each, atol=1e-8)
    assert [image[0, 0, 0] // 10 for image, *_ in scores.samples] == [labels[0], labels[2], labels[4]]
    for (_, truth, plain, refined), i in zip(scores.samples, (0, 2, 4), strict=True):
        np.testing.assert_array_equal(truth, masks[i])
        assert set(plain.flat) == {labels[i]} and set(refined.flat) == {(labels[i] + 1) % 3}
    given = evaluation.evaluate(grey_level_segmenter(), source, crf=False, batch_size=batch_size, use_tags=True)
    np.testing.assert_array_equal(given.plain, confusion_by_hand([0] * 5, masks))


def parted(count=5):
    """(labels, masks, the source in two parts): images 0, 2, 4 and 1, 3."""
    rng = np.random.default_rng(1)
    labels, masks = [0, 2, 1, 1, 0][:count], [rng.choice(np.uint8([0, 1, 2, 255]), (4, 5)) for _ in range(count)]
    return labels, masks, in_parts(Flat(labels, masks), 2)


def test_parts_are_counted_in_the_pass_over_the_split_and_add_up_to_it():
    labels, masks, parts = parted()
    scores = evaluation.evaluate(
        grey_level_segmenter(), parts, crf=True, num_samples=2, batch_size=2, smooth=lambda image, found: (found + 2) % 3
    )
    whole = evaluation.evaluate(grey_level_segmenter(), parts.source, crf=True, num_samples=2, batch_size=2)
    for name, shift in (("plain", 0), ("refined", 1), ("smoothed", 2)):
        for k in (0, 1):
            expected = confusion_by_hand([(label + shift) % 3 for label in labels[k::2]], masks[k::2])
            np.testing.assert_array_equal(scores.parts[name][k], expected)
        np.testing.assert_array_equal(scores.parts[name].sum(axis=0), getattr(scores, name))
    assert scores.parts["plain"].shape == (2, 3, 3) and whole.parts["plain"].shape == (1, 3, 3) and set(whole.parts) == {"plain", "refined"}
    for name in ("plain", "refined", "image_scores"):
        np.testing.assert_array_equal(getattr(scores, name), getattr(whole, name))
    assert len(scores.samples) == 2


def test_the_parts_of_several_processes_add_up_to_those_of_one(monkeypatch):
    _, _, parts = parted()
    alone = evaluation.evaluate(grey_level_segmenter(), parts, crf=True, batch_size=2).parts
    shares = []
    for process in range(2):
        monkeypatch.setattr(evaluation, "share", lambda length, process=process: (range(3), range(3, length))[process])
        shares.append(evaluation.evaluate(grey_level_segmenter(), parts, crf=True, batch_size=2).parts)
    for name, counts in alone.items():
        assert shares[0][name].any() and shares[1][name].any()
        np.testing.assert_array_equal(shares[0][name] + shares[1][name], counts)


def test_a_photograph_that_vanishes_ends_the_scoring_with_a_remedy():
    source = Vanishing([0, 1, 2], [np.zeros((4, 4), np.uint8)] * 3)
    source.fault = FileNotFoundError("p143.jpg does not exist")
    remedy = "p143.jpg does not exist. Nothing is scored, since a part of val would have another score. Bring the file back, or take it out of the split, and run the same"
    with pytest.raises(UserError, match=f"^{remedy} command again$"):
        evaluation.evaluate(grey_level_segmenter(), source, crf=False, batch_size=2)
    with pytest.raises(FileNotFoundError, match="^p143.jpg does not exist$"):  # of a report, beside scores that stand
        evaluation.labelled_samples(grey_level_segmenter(), source, [2])


def test_a_fault_of_the_house_while_images_are_read_stays_one():
    source = Vanishing([0, 1], [np.zeros((4, 4), np.uint8)] * 2)
    source.fault = ValueError("broadcast")
    with pytest.raises(ValueError, match="^broadcast$"):
        evaluation.evaluate(grey_level_segmenter(), source, crf=False, batch_size=2)
