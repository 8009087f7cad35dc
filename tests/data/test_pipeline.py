"""Records of views, and batches whose order is seeded, complete and resumable."""

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
from lcrf_jax.data.pipeline import ImageSubset, ViewDataset, one_ahead, prefetched


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


class Gone:
    names, fingerprint = ("p.jpg",), ("gone",)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise FileNotFoundError("p.jpg does not exist")


def test_a_photograph_that_has_vanished_is_told_with_the_remedy():
    with pytest.raises(FileNotFoundError, match="^p.jpg does not exist. It was there when the data was looked at: bring it back, and run the same command again"):
        ViewDataset(Gone(), 1, 32)[0]


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


def test_one_ahead_begins_the_next_one_before_it_gives_one_out():
    begun = []
    pairs = one_ahead("abc", lambda item: begun.append(item) or item.upper())
    assert next(pairs) == ("a", "A") and begun == ["a", "b"]
    assert list(pairs) == [("b", "B"), ("c", "C")] and begun == ["a", "b", "c"]
    assert list(one_ahead([], str)) == []


def test_what_cannot_begin_is_told_before_the_one_ahead_of_it_is_given_out():
    def begin(item):
        return 1 // item

    pairs = one_ahead([1, 2, 0, 3], begin)
    assert next(pairs) == (1, 1)
    with pytest.raises(ZeroDivisionError):
        next(pairs)
