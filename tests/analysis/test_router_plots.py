"""Who processes what, against a count by hand; pictures that are drawn."""

import keras
import models
import numpy as np
import pytest

import keras_upcycle as ku
from keras_upcycle.analysis import assignments

# A token's one expert is enough here; that routers learn is not the point.
pytestmark = pytest.mark.filterwarnings("ignore:top_k=1 with")


def model(router):
    layer = ku.MoEFeedForward(4, 8, router=router, name="moe")
    inputs = keras.Input((5, 4))
    made = keras.Model(inputs, layer(inputs))
    # An expert likes a feature.
    layer.router.kernel.assign(10 * np.eye(4, dtype="float32"))
    return made


# The feature of each token, two examples.
FEATURES = np.array([[0, 1, 1, 2, 3], [1, 1, 1, 1, 0]])
TOKENS = np.eye(4, dtype="float32")[FEATURES]


def test_tokens_go_where_their_feature_says():
    made = model(ku.TopKRouter(1))
    shares = ku.expert_assignments(made, TOKENS, FEATURES)["moe"]
    np.testing.assert_array_equal(shares, np.eye(4))
    by_class = ku.expert_assignments(made, TOKENS, [1, 3])["moe"]
    assert np.isnan(by_class[[0, 2]]).all()
    np.testing.assert_allclose(by_class[1], [0.2, 0.4, 0.2, 0.2])
    np.testing.assert_allclose(by_class[3], [0.2, 0.8, 0.0, 0.0])


def test_a_negative_label_is_left_out():
    labels = np.where(FEATURES == 1, -1, FEATURES)
    made = model(ku.TopKRouter(1))
    shares = ku.expert_assignments(made, TOKENS, labels)["moe"]
    assert np.isnan(shares[1]).all()
    np.testing.assert_array_equal(shares[[0, 2, 3]], np.eye(4)[[0, 2, 3]])


def test_experts_that_choose_are_counted_by_their_tokens():
    made = model(ku.ExpertChoiceRouter(1.0))  # two tokens an expert
    shares = ku.expert_assignments(made, TOKENS, FEATURES)["moe"]
    np.testing.assert_allclose(shares.sum(1), 1)
    # All six tokens of feature 1 compete for expert 1's two slots of each
    # example, and win them.
    assert shares[1, 1] == shares[1].max() > 0


@pytest.mark.one_backend
def test_blocks_of_another_length_are_left_out():
    t5 = models.t5_backbone()
    moe = ku.upcycle_model(t5, 2)
    inputs = models.t5_inputs(source=6, target=5)
    ids = np.asarray(inputs["encoder_token_ids"])
    both = ku.expert_assignments(moe, inputs, np.arange(len(ids)))
    assert len(both) == 2
    encoder = ku.expert_assignments(moe, inputs, ids)
    assert len(encoder) == 1
    assert "encoder" in next(iter(encoder))


@pytest.mark.one_backend
def test_the_most_distinct_labels_are_those_with_experts_of_their_own():
    shares = {"a": np.array([[0.5, 0.5], [0.5, 0.5], [1, 0], [np.nan] * 2])}
    assert assignments.most_distinct(shares, 1).tolist() == [2]
    assert assignments.most_distinct(shares, 4).tolist() == [0, 1, 2]


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([0.5, 1.0], "dtype float64"),
        ([0, 1, 2], r"shape \(3,\)"),
        (np.zeros((2, 3), int), r"\(2, 3\)"),
    ],
)
def test_labels_that_do_not_fit(labels, text):
    with pytest.raises(ValueError, match=text):
        ku.expert_assignments(model(ku.TopKRouter(1)), TOKENS, labels)


def reading(layer, step, load):
    return ku.RouterReading(
        step=step,
        layer=layer,
        steps=10,
        tokens=100,
        load=np.array(load),
        dropped=0.0,
        unrouted=0.0,
        entropy=1.0,
        confidence=0.5,
        weight=1.0,
        losses={},
        weighted_loss=0.0,
    )


@pytest.mark.one_backend
def test_pictures_are_drawn(tmp_path):
    plots = [
        lambda path: ku.plot_expert_load(
            [
                reading("a", 10, [0.5, 0.5, 0.0]),
                reading("b", 10, [0.5, 0.5]),
                reading("a", 20, [0.2, 0.3, 0.5]),
            ],
            path,
        ),
        lambda path: ku.plot_expert_assignments(
            {"a": np.eye(3), "b": np.full((3, 2), np.nan)},
            path,
            names=["x", "y", "z"],
        ),
    ]
    for draw in plots:
        path = tmp_path / "picture.png"
        draw(path)
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()


@pytest.mark.one_backend
def test_nothing_to_draw(tmp_path):
    path = tmp_path / "picture.png"
    with pytest.raises(ValueError, match="readings to draw"):
        ku.plot_expert_load([], path)
    with pytest.raises(ValueError, match="at least one block"):
        ku.plot_expert_assignments({}, path)
    with pytest.raises(ValueError, match=r"all 2 labels.*3 names"):
        ku.plot_expert_assignments({"a": np.eye(2)}, path, names="xyz")
    assert not path.exists()
