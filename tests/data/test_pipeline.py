"""Views that keep maps aligned, and batches whose order is seeded, complete and resumable."""

import json
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lcrf_jax.bound.record import Record
from lcrf_jax.data.example import Example
from lcrf_jax.data.loader import device_prefetch, make_loader, stack_records, to_devices
from lcrf_jax.data.pipeline import ImageSubset, ViewDataset, prefetched
from lcrf_jax.data.views import FULL, MIRRORED, View, apply_view, apply_view_to_mask, sample_view

CROP = View((0.2, 0.1, 0.5, 0.75), False)


class Numbers:
    """A source whose image i is filled with i."""

    class_names = ("background", "cat")
    split = "train"

    def __init__(self, length, masks=False, fail_at=None):
        self.length, self.masks, self.fail_at = length, masks, fail_at

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if i == self.fail_at:
            raise ValueError(f"image {i} is damaged")
        mask = np.full((5, 7), i % 2, np.uint8) if self.masks else None
        return Example(f"n{i}", np.full((5, 7, 3), i, np.uint8), np.array([True, i % 2 == 1]), mask)


def ramp(height, width):
    """[height, width, 3] with channel 0 the row position and channel 1 the column position, each in 0..1."""
    rows = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    columns = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    return np.stack([rows, columns, np.zeros((height, width))], -1)


# --- views ----------------------------------------------------------------------------------------


def test_first_views_are_the_whole_image():
    options = {"scale_range": (0.3, 0.8), "ratio_range": (0.5, 2.0)}
    assert sample_view(0, 5, 0, **options) == FULL == View((0, 0, 1, 1), False)
    assert sample_view(0, 5, 1, **options) == MIRRORED == View((0, 0, 1, 1), True)


def test_random_views_are_seeded_within_bounds_and_have_the_asked_area():
    views = [
        sample_view(3, i, number, scale_range=(0.3, 0.8), ratio_range=(0.5, 2.0))
        for i in range(100)
        for number in (2, 3)
    ]
    assert views[7] == sample_view(3, 3, 3, scale_range=(0.3, 0.8), ratio_range=(0.5, 2.0))
    assert len(set(views)) == len(views)
    assert sample_view(4, 3, 3) != sample_view(3, 3, 3)
    boxes = np.array([view.box for view in views])
    areas = boxes[:, 2] * boxes[:, 3]
    ratios = boxes[:, 3] / boxes[:, 2]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 1 + 1e-9).all()
    assert areas.min() > 0.3 - 1e-9 and areas.max() < 0.8 + 1e-9 and areas.std() > 0.1
    assert ratios.min() > 0.5 - 1e-9 and ratios.max() < 2 + 1e-9 and ratios.std() > 0.2
    assert 0.35 < np.mean([view.flip for view in views]) < 0.65


def test_extreme_ranges_stay_inside():
    assert sample_view(0, 0, 2, scale_range=(1, 1), ratio_range=(0.1, 10)).box == pytest.approx((0, 0, 1, 1))
    box = sample_view(0, 0, 2, scale_range=(0.9, 0.9), ratio_range=(4, 4)).box
    assert box[3] == pytest.approx(1) and box[2] == pytest.approx(0.9)


@pytest.mark.parametrize("view", [FULL, MIRRORED, CROP, CROP._replace(flip=True)])
def test_image_map_and_mask_of_one_view_align(view):
    """A ramp at three resolutions shows, after the view, the positions that the view asks for, in each."""
    image = np.rint(ramp(200, 160) * 255).astype(np.uint8)
    coarse = ramp(25, 20).astype(np.float32)
    mask = (image[..., 1] // 2).astype(np.uint8)
    top, left, height, width = view.box
    wanted = ramp(40, 40) * (height, width, 1) + (top, left, 0)
    wanted = wanted[:, ::-1] if view.flip else wanted
    inner = (slice(2, -2), slice(2, -2))
    shown = apply_view(image, view, (40, 40))
    assert shown.dtype == np.uint8
    np.testing.assert_allclose(shown[inner] / 255, wanted[inner], atol=0.006)
    mapped = apply_view(coarse, view, (40, 40))
    assert mapped.dtype == np.float32
    np.testing.assert_allclose(mapped[inner], wanted[inner], atol=1e-5)
    labels = apply_view_to_mask(mask, view, (40, 40))
    np.testing.assert_allclose(labels[inner] * 2 / 255, wanted[inner][..., 1], atol=0.02)


def test_views_by_hand():
    row = np.array([[[0.0], [1.0], [2.0], [3.0]]])
    assert apply_view(row, FULL, (1, 4)).ravel().tolist() == [0, 1, 2, 3]
    assert apply_view(row, MIRRORED, (1, 4)).ravel().tolist() == [3, 2, 1, 0]
    assert apply_view(row, FULL, (1, 2)).ravel().tolist() == [0.5, 2.5]
    assert apply_view(row, FULL, (1, 8)).ravel().tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]
    assert apply_view(row, View((0, 0.5, 1, 0.5), False), (2, 2)).ravel().tolist() == [2, 3, 2, 3]
    mask = np.array([[0, 1, 2, 255]], np.uint8)
    assert apply_view_to_mask(mask, View((0, 0.5, 1, 0.5), True), (1, 4)).ravel().tolist() == [255, 255, 2, 2]


def test_the_whole_image_at_its_own_size_is_unchanged():
    image = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    np.testing.assert_array_equal(apply_view(image, FULL, (9, 13)), image)
    np.testing.assert_array_equal(apply_view(image, MIRRORED, (9, 13)), image[:, ::-1])
    values = image.astype(np.float64)
    np.testing.assert_allclose(apply_view(values, FULL, (9, 13)), values, atol=1e-9)


def test_one_pixel_and_float16():
    assert (
        apply_view(np.full((1, 1, 3), 7, np.uint8), CROP, (4, 4)).tolist() == np.full((4, 4, 3), 7).tolist()
    )
    assert apply_view(np.ones((1, 1, 2), np.float16), CROP, (3, 3)).dtype == np.float16


@pytest.mark.parametrize(
    "image, view, size, message",
    [
        (np.zeros((4, 4), np.uint8), FULL, (2, 2), "one image"),
        (np.zeros((0, 4, 3), np.uint8), FULL, (2, 2), "at least one pixel"),
        (np.zeros((4, 4, 3), np.int32), FULL, (2, 2), "int32"),
        (np.zeros((4, 4, 4), np.uint8), FULL, (2, 2), r"\[H, W, 3\]"),
        (np.zeros((4, 4, 3), np.uint8), View((0, 0, 4, 4), False), (2, 2), "in fractions"),
        (np.zeros((4, 4, 3), np.uint8), View((0.5, 0, 0.6, 1), False), (2, 2), "within 0 .. 1"),
        (np.zeros((4, 4, 3), np.uint8), FULL, (0, 2), "at least one pixel"),
    ],
)
def test_apply_view_rejections(image, view, size, message):
    with pytest.raises(ValueError, match=message):
        apply_view(image, view, size)


def test_sample_view_rejections():
    with pytest.raises(ValueError, match="scale_range"):
        sample_view(0, 0, 2, scale_range=(0.5, 1.5))
    with pytest.raises(ValueError, match="ratio_range"):
        sample_view(0, 0, 2, ratio_range=(2, 1))
    with pytest.raises(ValueError, match="0 or more"):
        sample_view(0, -1, 2)


# --- view records ---------------------------------------------------------------------------------


def test_view_dataset_records():
    items = ViewDataset(Numbers(3), num_views=4, size=8, seed=1)
    assert len(items) == 12
    record = items[3 * 3 + 1]
    given = {name for name, value in record._asdict().items() if value is not None}
    assert given == {"name", "image", "tags", "index", "view"}
    assert (record.name, record.index, record.view) == ("n1", 1, 3)
    assert record.image.shape == (8, 8, 3) and (record.image == 1).all()
    assert record.tags.tolist() == [True, True]
    with pytest.raises(IndexError):
        items[12]
    masked = ViewDataset(Numbers(3, masks=True), num_views=1, size=8)[1]
    assert masked.mask.shape == (8, 8) and (masked.mask == 1).all()
    with pytest.raises(ValueError, match="at least 1"):
        ViewDataset(Numbers(3), num_views=0, size=8)


# --- batches --------------------------------------------------------------------------------------


def records(length):
    return [Record(np.full((2,), i, np.float32), name=f"n{i}", index=np.int32(i)) for i in range(length)]


def indices(batches):
    return [batch.index.tolist() for batch in batches]


def test_a_subset_has_the_images_in_all_of_their_views():
    items = ViewDataset(Numbers(4), num_views=3, size=8, seed=1)
    subset = ImageSubset(items, np.array([1, 3]), 3)
    assert len(subset) == 6
    assert [(r.name, int(r.view)) for r in (subset[i] for i in range(6))] == [
        ("n1", 0), ("n3", 0), ("n1", 1), ("n3", 1), ("n1", 2), ("n3", 2)]
    with pytest.raises(ValueError, match="at least one image to keep"):
        ImageSubset(items, np.array([], int), 3)


@pytest.mark.parametrize("num_threads", [0, 3])
def test_every_record_once_an_epoch_and_another_order_each(num_threads):
    loader = make_loader(records(10), batch_size=5, seed=3, num_epochs=3, num_threads=num_threads)
    batches = list(loader)
    epochs = np.array(indices(batches)).reshape(3, 10)
    assert np.sort(epochs).tolist() == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs.tolist()} | {tuple(range(10))}) == 4
    assert np.concatenate([batch.epoch for batch in batches]).tolist() == np.repeat([0, 1, 2], 10).tolist()
    for batch in batches:
        assert batch.name.tolist() == [f"n{i}" for i in batch.index]
        np.testing.assert_array_equal(batch.tags, np.stack([batch.index] * 2, 1))


def test_the_order_depends_on_the_seed_alone():
    def order(seed, num_threads):
        loader = make_loader(records(40), batch_size=8, seed=seed, num_epochs=2, num_threads=num_threads)
        return indices(loader)

    assert order(1, 0) == order(1, 4)
    assert order(1, 0) != order(2, 0)


def test_remainders_and_plain_order():
    plain = {"shuffle": False, "num_epochs": 1, "num_threads": 1}
    assert indices(make_loader(records(5), batch_size=2, drop_remainder=True, **plain)) == [[0, 1], [2, 3]]
    assert indices(make_loader(records(5), batch_size=2, drop_remainder=False, **plain)) == [
        [0, 1],
        [2, 3],
        [4],
    ]


def test_an_epoch_that_does_not_fill_its_last_batch_goes_on_into_the_next():
    loader = make_loader(records(5), batch_size=2, seed=0, num_epochs=None, num_threads=2)
    batches = [next(loader) for _ in range(10)]
    drawn, epochs = (np.concatenate([getattr(batch, key) for batch in batches]) for key in ("index", "epoch"))
    assert epochs.tolist() == np.repeat(range(4), 5).tolist()
    assert np.sort(drawn.reshape(4, 5)).tolist() == [list(range(5))] * 4


@pytest.mark.parametrize("stop", [0, 1, 3, 7, 9])
def test_resume_in_the_middle_of_an_epoch_equals_no_interruption(stop):
    def loader():
        return make_loader(records(11), batch_size=3, seed=5, num_epochs=4, num_threads=2)

    whole = indices(loader())
    first = loader()
    start = [next(first).index.tolist() for _ in range(stop)]
    state = json.loads(json.dumps(first.get_state()))
    second = loader()
    next(second)
    second.set_state(state)
    assert start + indices(second) == whole


def test_the_state_is_good_for_another_number_of_processes(monkeypatch):
    whole = indices(make_loader(records(12), batch_size=4, seed=2, num_epochs=2))
    one = make_loader(records(12), batch_size=4, seed=2, num_epochs=2)
    start = [next(one).index.tolist() for _ in range(4)]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shares = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        share = make_loader(records(12), batch_size=4, seed=2, num_epochs=2)
        share.set_state(one.get_state())
        shares.append(indices(share))
    assert start + [[*first, *second] for first, second in zip(*shares, strict=True)] == whole


@pytest.mark.parametrize("state", [None, {}, {"next_index": 3}, b"batches", {"batches": 1, "more": 2}])
def test_a_state_of_something_else_is_refused(state):
    with pytest.raises(ValueError, match="expected the state of a loader"):
        make_loader(records(12), batch_size=4).set_state(state)


def test_nothing_comes_after_the_last_batch():
    loader = make_loader(records(8), batch_size=4, num_epochs=1)
    loader.set_state({"batches": 2})
    assert list(loader) == []


def test_views_change_with_the_epoch():
    source = Numbers(4)
    items = ViewDataset(source, num_views=3, size=4)
    loader = make_loader(items, batch_size=4, seed=0, num_epochs=5, num_views=3)
    for epoch, batch in enumerate(loader):
        assert batch.view.tolist() == [epoch % 3] * 4
        assert sorted(batch.index.tolist()) == [0, 1, 2, 3]
        assert batch.image.dtype == np.uint8 and batch.image.shape == (4, 4, 4, 3)
        assert batch.image[:, 0, 0, 0].tolist() == batch.index.tolist()


def test_shares_of_two_processes_make_one_batch(monkeypatch):
    whole = list(make_loader(records(12), batch_size=4, seed=2, num_epochs=2))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shares = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(list(make_loader(records(12), batch_size=4, seed=2, num_epochs=2)))
    assert len(whole) == len(shares[0]) == len(shares[1]) == 6
    for batch, first, second in zip(whole, *shares):
        assert first.index.shape == (2,)
        for name in ("index", "epoch"):
            assert getattr(batch, name).tolist() == [*getattr(first, name), *getattr(second, name)]
    with pytest.raises(ValueError, match="multiple of the 2 process"):
        make_loader(records(12), batch_size=3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "positive multiple"),
        ({"batch_size": 2, "num_views": 4}, "10 items cannot be 4 runs"),
        ({"batch_size": 2, "num_threads": -1}, "num_threads"),
        ({"batch_size": 2, "num_epochs": 0}, "num_epochs"),
        ({"batch_size": 16, "num_epochs": 1}, "do not fill one batch of 16"),
    ],
)
def test_loader_rejections(options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(records(10), **options)


def test_records_that_do_not_stack():
    with pytest.raises(ValueError, match=r"'tags' has the shapes \[\(1,\), \(2,\)\].*a, b"):
        stack_records([Record(np.zeros(1), name="a"), Record(np.zeros(2), name="b")])
    with pytest.raises(ValueError, match=r"'features.s8' has the shapes \[\(1,\), \(2,\)\]"):
        stack_records([Record(np.zeros(1), features={"s8": np.zeros(1 + i)}) for i in range(2)])
    with pytest.raises(ValueError, match=r"the same fields; \['guide'\] are missing in some"):
        stack_records([Record(np.zeros(1), guide=np.zeros(1)), Record(np.zeros(1))])


# --- devices --------------------------------------------------------------------------------------


def data_sharding():
    return NamedSharding(
        jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(jax.sharding.AxisType.Auto,)),
        PartitionSpec("data"),
    )


def test_device_prefetch_gives_the_same_batches_on_the_devices():
    num = 2 * len(jax.devices())
    host = list(make_loader(records(3 * num), batch_size=num, seed=1, num_epochs=2))
    loader = make_loader(records(3 * num), batch_size=num, seed=1, num_epochs=2)
    placed = list(device_prefetch(loader, data_sharding(), depth=3))
    assert len(placed) == len(host) == 6
    for batch, expected in zip(placed, host):
        assert isinstance(batch.tags, jax.Array) and batch.tags.sharding == data_sharding()
        np.testing.assert_array_equal(batch.tags, expected.tags)
        assert batch.name.tolist() == expected.name.tolist()


def test_device_prefetch_state_counts_what_was_handed_out():
    num = len(jax.devices())

    def loader():
        return make_loader(records(7 * num), batch_size=num, seed=1, num_epochs=2)

    whole = indices(loader())
    ahead = device_prefetch(loader(), data_sharding(), depth=3)
    states = [ahead.get_state()]
    for _ in range(5):
        next(ahead)
        states.append(ahead.get_state())
    for count, state in enumerate(states):
        resumed = device_prefetch(loader(), data_sharding(), depth=2)
        next(resumed)
        resumed.set_state(state)
        assert resumed.get_state() == state
        assert indices(resumed) == whole[count:]


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    class Four:
        device_set = range(4)

        def shard_shape(self, shape):
            raise ValueError("6 is not divisible by 4")

    with pytest.raises(
        ValueError, match="batch of 6 .* 4 devices: choose a batch size that is a multiple of 4"
    ):
        to_devices(Record(np.zeros((6, 2))), Four())
    if len(jax.devices()) > 1:
        with pytest.raises(ValueError, match="multiple of"):
            to_devices(Record(np.zeros((len(jax.devices()) + 1, 2))), data_sharding())
    with pytest.raises(ValueError, match="depth"):
        device_prefetch(iter(()), data_sharding(), depth=0)


# --- evaluation -----------------------------------------------------------------------------------


def test_prefetched_keeps_the_order_and_reads_ahead_a_little():
    class Slow(Numbers):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.started, self.lock = [], threading.Lock()

        def __getitem__(self, i):
            with self.lock:
                self.started.append(i)
            time.sleep(0.002 * (i % 3))
            return super().__getitem__(i)

    source = Slow(20)
    reader = prefetched(source, num_threads=3)
    first = next(reader)
    assert first.name == "n0" and len(source.started) <= 8
    assert [first.name, *(example.name for example in reader)] == [f"n{i}" for i in range(20)]


def test_prefetched_passes_errors_on_at_their_turn():
    reader = prefetched(Numbers(6, fail_at=2), num_threads=2)
    assert [next(reader).name for _ in range(2)] == ["n0", "n1"]
    with pytest.raises(ValueError, match="image 2 is damaged"):
        next(reader)
    with pytest.raises(ValueError, match="num_threads"):
        prefetched(Numbers(3), num_threads=0)
