"""What training starts from: what is read of the data, records, cues, and settings that cannot be."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image
from small_runs import small_config

from lcrf_jax.data.sources.textures import TexturesSource
from lcrf_jax.runfolder.description import CheckpointError
from lcrf_jax.train import fit, plan, preparation


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def prepared(cache):
    with contextlib.redirect_stderr(io.StringIO()):
        return preparation.prepare(small_config(cache))


@pytest.mark.parametrize(("changes", "message"), [
    ({"method": "full"}, r"method: expected one of \['cam', .*'full_supervision', 'latent_crf', .*\], got 'full'"),
    ({"input_size": 100}, "input_size: expected a multiple of 32, got 100"),
    ({"weights": "my.pth"}, "weights: expected '' or random for the network 'small', got 'my.pth'"),
    ({"network__decoder": "unet"}, r"network\.decoder: expected one of .*'unet'"),
    ({"views__num_views": 1}, "num_views of at least 2"),
    ({"network__backbone": "vgg"}, r"network\.backbone: expected one of .*'vgg'"),
    ({"data__kind": "coco"}, "unknown source 'coco'"),
    ({"batch_size": 32}, "24 training images do not fill one batch of 32"),
    ({"objective__likelihood": "noisy_and"}, r"objective\.likelihood: expected one of .*'noisy_or'.*'noisy_and'"),
    ({"objective__estimator": "nuts"}, r"objective\.estimator: expected one of .*'mcmc'.*'nuts'"),
    ({"objective__estimator": "reinforce"}, r"objective\.num_samples: expected a finite number >= 2, got 1"),
    ({"objective__estimator": "exact", "objective__likelihood": "gwrp"}, r"'exact' needs a likelihood .*'gwrp'"),
    ({"objective__estimator": "mcmc", "objective__entropy_weight": 0.5}, "needs .*got {'entropy_weight': 0.5}"),
    ({"objective__estimator": "mcmc", "views__num_views": 1, "epochs": (1,)}, "'mcmc' needs views.num_views of at least 2"),
    ({"objective__temperature": 0.0}, r"objective\.temperature: expected a finite number > 0"),
    ({"objective__pairwise_stride": 3}, r"objective\.pairwise_stride: expected a divisor of 16"),
], ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "")
def test_settings_that_cannot_be_are_refused_before_anything_is_computed(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        preparation.prepare(small_config(tmp_path, **changes))
    assert not any(tmp_path.iterdir())


def test_a_run_can_be_refused_before_anything_is_computed(tmp_path):
    def refuse(description):
        assert description["data"]["train"]["images"] == 24 and len(description["class_names"]) == 7
        raise CheckpointError("of another model")

    with pytest.raises(CheckpointError, match="of another model"):
        preparation.prepare(small_config(tmp_path), check=refuse)
    assert not any(tmp_path.iterdir())


def test_settings_that_no_data_makes_right_are_refused_before_it_is_read(tmp_path):
    config = small_config(tmp_path, data__kind="folder", data__root=str(tmp_path / "nowhere"), data__options={})
    with pytest.raises(ValueError, match="network.decoder: expected one of"):
        preparation.prepare({**config, "network": {**config["network"], "decoder": "unet"}})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        preparation.prepare(config)


@pytest.mark.slow
def test_the_latent_crf_learns_from_cues_and_gradient_saliency_where_it_is_told_to(cache, tmp_path):
    config = small_config(cache, objective__cue_confidence=0.9)
    evidence = {**config["objective"]["likelihood_options"]["evidence"], "saliency_weight": 2.0, "objectness_weight": 1.0}
    config["objective"]["likelihood_options"] = {**config["objective"]["likelihood_options"], "evidence": evidence}
    config["objective"]["further_likelihoods"] = {"gwrp": 3.0}
    given = preparation.prepare(config)
    assert given.cues.shape == (24, 6, 6) and given.gradient_saliency.shape == (24, 6, 6, 1)
    assert given.gradient_saliency.min() == 0 and given.gradient_saliency.max() == 1
    record = preparation.training_records(given)[24 + 3]  # the mirror image of the fourth
    np.testing.assert_array_equal(record.gradient_saliency, given.gradient_saliency[3][:, ::-1])
    np.testing.assert_array_equal(record.cues, given.cues[3][:, ::-1])
    np.testing.assert_array_equal(record.objectness[..., 0], np.float32(given.maps.objectness[3])[:, ::-1])
    assert record.class_maps is not None and record.peaks is not None
    later = preparation.training_records(given, np.full((24, 6, 6, 7), 1 / 7, np.float16))[0]
    assert later.cues is later.gradient_saliency is later.class_maps is None
    fit.train(given, tmp_path / "run")
    assert (tmp_path / "run" / "last").is_dir()


@pytest.mark.slow
def test_cues_come_from_the_classifier_or_from_a_file(cache, tmp_path):
    with contextlib.redirect_stderr(io.StringIO()):
        given = preparation.prepare(small_config(cache, method="sec", epochs=(1,)))
    assert given.cues.shape == (24, 6, 6) and given.cues.dtype == np.uint8
    record = preparation.training_records(given)[24 + 3]
    np.testing.assert_array_equal(record.cues, given.cues[3][:, ::-1])
    np.savez(tmp_path / "cues.npz", ids=np.array(given.train.names), cues=np.full((24, 41, 41), 255, np.uint8))
    config = small_config(cache, method="sec", epochs=(1,))
    config["baselines"]["cues"]["background_by"] = "objectness"
    others = preparation.prepare(config)
    assert (others.cues != given.cues).any() and ((others.cues == 0).sum(axis=(1, 2)) > 0).any()
    quiet = others.maps.objectness[others.cues == 0]
    assert quiet.mean() < others.maps.objectness.mean(), "where objectness is least"
    config = small_config(cache, method="sec", epochs=(1,))
    config["baselines"]["cues"]["file"] = str(tmp_path / "cues.npz")
    assert (preparation.prepare(config).cues == 255).all()


@pytest.mark.slow
def test_masks_of_the_training_images_are_never_made(cache, monkeypatch):
    original = TexturesSource.__getitem__

    def watched(self, index):
        example = original(self, index)
        assert self.split != "train" or (not self.masks and example.mask is None)
        return example

    monkeypatch.setattr(TexturesSource, "__getitem__", watched)
    again = preparation.prepare(small_config(cache / "fresh"))
    assert not again.train.masks and again.val.masks
    records = preparation.training_records(again)
    assert all(records[i].mask is None for i in range(len(records)))


@pytest.mark.slow
def test_full_supervision_has_masks_and_needs_no_classifier(cache):
    given = preparation.prepare(small_config(cache, method="full_supervision", epochs=(1,)))
    assert given.classifier is None and given.maps is None and given.train.masks
    record = preparation.training_records(given)[3]
    np.testing.assert_array_equal(record.mask, given.train[3].mask)
    description = given.plan.description(given.digest)
    assert description["supervision"] == "masks"


def test_records_hold_what_the_likelihoods_need(prepared):
    number = len(prepared.train) + 5  # the mirrored view of image 5
    record = preparation.training_records(prepared)[number]
    np.testing.assert_array_equal(record.class_maps, np.float32(prepared.maps.maps[5])[:, ::-1])
    np.testing.assert_array_equal(record.peaks, np.float32(prepared.maps.maps[5]).max(axis=(0, 1)))
    np.testing.assert_array_equal(record.bias, prepared.classifier.bias)
    np.testing.assert_array_equal(record.tags, prepared.train.tags[5])
    assert record.image is None and record.features["s16"].shape == (6, 6, 32)
    evidence = np.random.default_rng(0).random((24, 6, 6, 7)).astype(np.float16)
    record = preparation.training_records(prepared, evidence)[number]
    np.testing.assert_array_equal(record.pixel_evidence, np.float32(evidence[5])[:, ::-1])
    assert record.class_maps is None


def test_without_a_feature_cache_records_hold_images(cache):
    config = small_config(cache, cache__features=False, epochs=(1,), views__num_views=3)
    given = preparation.prepare(config)
    record = preparation.training_records(given)[2 * 24 + 5]
    assert record.image.shape == (96, 96, 3) and record.class_maps.shape == (6, 6, 6)
    assert record.features is None


@pytest.mark.parametrize("stride", [3, 32, -1])
def test_a_pairwise_stride_that_does_not_divide_is_told(prepared, stride):
    with pytest.raises(ValueError, match=f"objective.pairwise_stride: expected a divisor of 16.*got {stride}"):
        plan.guide_stride(small_config("", objective__pairwise_stride=stride), prepared.network)


def test_a_folder_without_masks_has_no_validation(tmp_path, capsys):
    for folder in ("JPEGImages", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("one", "two"):
        Image.new("RGB", (20, 10)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
    (tmp_path / "classes.txt").write_text("background\ncat\n")
    (tmp_path / "tags.csv").write_text("image,tags\none,cat\ntwo,\n")
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("one\ntwo\n")
    config = {"method": "latent_crf", "data": {
        "kind": "folder", "root": str(tmp_path), "train_split": "train", "val_split": "val", "options": {}}}
    train, val = preparation.open_data(config)
    assert len(train) == 2 and val is None
    assert "no validation" in capsys.readouterr().out
    (tmp_path / "ImageSets" / "Segmentation" / "val.txt").write_text("one\n")
    assert preparation.open_data(config)[1] is None
    assert "has no mask for one" in capsys.readouterr().out
    config["data"]["val_split"] = ""
    assert preparation.open_data(config)[1] is None and capsys.readouterr().out == ""
    with pytest.raises(FileNotFoundError, match="has no test.txt"):
        preparation.open_data({**config, "data": {**config["data"], "train_split": "test"}})
