"""Ten-shot accuracy of saved models: what is taken for features, and said."""

import json

import keras
import keras_hub
import numpy as np
import pytest
import ten_shot

import keras_upcycle as ku

pytestmark = pytest.mark.one_backend


@pytest.fixture(autouse=True)
def images(monkeypatch):
    """Three classes of 8 x 8 images that differ in their colour."""
    asked = []

    def load(name, split, data_dir):
        asked.append((name, split, data_dir))
        rng = np.random.default_rng(len(split))
        labels = np.arange(60) % 3
        pixels = rng.integers(0, 120, (60, 8, 8, 3))
        pixels[np.arange(60), :, :, labels] += 100
        if name == "grey":
            pixels = pixels[..., :1]
        if name == "names":
            return {"image": pixels}
        return {"image": pixels.astype("uint8"), "label": labels}

    monkeypatch.setattr(ten_shot.tfds_reader, "load", load)
    return asked


def classifier(activation=None):
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=4,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
        use_class_token=False,
    )
    return keras_hub.models.ViTImageClassifier(
        backbone,
        num_classes=3,
        pooling="gap",
        activation=activation,
    )


def pixels():
    return np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype("float32")


# Where the head begins.


def test_a_kerashub_classifier_ends_before_its_dense_layer():
    model = classifier()
    features = ten_shot.up_to_features(model, "vit")
    assert features.output_shape == (None, 8)
    head = model.output_dense
    made = features.predict(pixels(), verbose=0)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(head(made)),
        model.predict(pixels(), verbose=0),
        rtol=1e-4,
        atol=1e-5,
    )


def small(*after, head=True):
    x = keras.Input((8, 8, 3))
    y = keras.layers.Flatten(name="flat")(x)
    y = keras.layers.Dense(5, name="hidden")(y)
    if head:
        y = keras.layers.Dense(3, name="head")(y)
    for layer in after:
        y = layer(y)
    return keras.Model(x, y)


@pytest.mark.parametrize(
    "after", [keras.layers.Softmax, lambda: keras.layers.Activation("softmax")]
)
def test_softmax_after_the_head_is_no_head(after):
    assert ten_shot.head_of(small(after())).name == "head"


def test_a_sequential_model_has_a_head_too():
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]
    )
    assert ten_shot.up_to_features(model, "x").output_shape == (None, 192)


def test_the_layer_can_be_named():
    found = ten_shot.up_to_features(small(), "x", "hidden")
    assert found.output_shape == (None, 192)


def test_a_backbone_is_all_features():
    backbone = classifier().backbone
    assert ten_shot.up_to_features(backbone, "x") is backbone


class Opaque(keras.Model):
    """No graph of layers."""

    def __init__(self):
        super().__init__()
        self.head = keras.layers.Dense(3, name="head")

    def call(self, x):
        return self.head(keras.ops.reshape(x, (-1, 192)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: small(keras.layers.LayerNormalization()),
        lambda: small(keras.Sequential([keras.layers.Dense(3)]), head=False),
        Opaque,
    ],
)
def test_a_head_that_cannot_be_told_is_refused(make):
    with pytest.raises(ValueError, match=r"mine\.keras.*cannot be told.*layer"):
        ten_shot.up_to_features(make(), "mine.keras")


def test_a_layer_without_one_input_is_refused():
    with pytest.raises(ValueError, match="'head' has no one input"):
        ten_shot.up_to_features(Opaque(), "mine.keras", "head")


# What models are given.


def test_images_come_in_the_size_and_range_of_the_model():
    args = ten_shot.parse(["x", "--pixels", "0", "1"])
    images = np.full((2, 4, 4, 3), 255, "uint8")
    keras.utils.set_random_seed(0)
    model = classifier()

    def prepared(*options):
        args = ten_shot.parse(["x", *options])
        return ten_shot.prepared("x", args, images)[1](images)

    ten_shot.load, kept = lambda name: (model, None), ten_shot.load
    try:
        low = prepared("--pixels", "0", "1")
        usual = prepared()
    finally:
        ten_shot.load = kept
    assert low.shape == usual.shape == (2, 8, 8, 3)
    np.testing.assert_allclose(low, 1, rtol=1e-6)
    np.testing.assert_allclose(usual, 1, rtol=1e-6)
    black = np.zeros((1, 4, 4, 3))
    assert ten_shot.scaling(*args.pixels)(black).max() == 0
    assert ten_shot.scaling(-1, 1)(black).max() == -1


def test_features_are_those_of_all_images_and_means_over_positions():
    model = classifier().backbone
    images, steps = pixels(), []
    found = ten_shot.features(
        model, lambda x: x, images, 3, lambda: steps.append(1)
    )
    expected = model.predict(images, verbose=0).mean(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert len(steps) == 2


# The whole script.


def test_dense_and_upcycled_are_measured(tmp_path, images, capsys):
    dense = classifier()
    moe = ku.upcycle_model(dense, 2, router=ku.ExpertChoiceRouter())
    names = []
    for name, model in (("dense", dense), ("upcycled", moe)):
        names.append(str(tmp_path / f"{name}.keras"))
        model.save(names[-1])
    dense.save_to_preset(str(tmp_path / "preset"))
    dense.backbone.save_to_preset(str(tmp_path / "backbone"))
    names += [str(tmp_path / "preset"), str(tmp_path / "backbone")]
    output = tmp_path / "made" / "results.json"
    options = "--dataset mine --data-dir here --shots 5 --draws 3"
    code = ten_shot.main([*names, *options.split(), f"--output={output}"])
    assert code == 0
    assert images == [("mine", "train", "here"), ("mine", "test", "here")]
    results = json.loads(output.read_text())["results"]
    assert [each["model"] for each in results] == names
    printed = capsys.readouterr().out
    for each in results:
        assert each["mean"] == pytest.approx(np.mean(each["accuracies"]))
        assert len(each["accuracies"]) == 3
        assert f"{each['model']} | {100 * each['mean']:.2f} %" in printed
    # A preset is what it was made of; its mean pool is the backbone's mean.
    assert results[0]["accuracies"] == results[2]["accuracies"]
    assert results[0]["mean"] == pytest.approx(results[3]["mean"], abs=0.05)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--dataset names", "names, with image. Choose"),
        ("--shots 30", "Received: 20 of class 0. Raise `--limit`"),
        ("--dataset grey", "takes (None, 8, 8, 3). Choose"),
        ("nowhere.keras", "Received: nowhere.keras"),
        ("nowhere", "nowhere"),
        ("--layer none", "none"),
        ("--draws 0", "draws"),
    ],
)
def test_what_is_wrong_is_said(options, expected, tmp_path, capsys):
    path = str(tmp_path / "model.keras")
    small().save(path)
    assert ten_shot.main([path, *options.split()]) == 2
    assert expected in capsys.readouterr().err
