"""Experts from several donors: which came from whom, and what is a mean."""

import keras
import models
import numpy as np
import pytest
from keras import ops

import keras_upcycle as ku
from keras_upcycle.conversion import pairing
from keras_upcycle.methods import donors, expert_weights

BUILDERS = {
    "vit": models.vit_classifier,
    "t5": models.t5_lm,
    "pairs": models.dense_pairs,
}
INPUTS = {
    "vit": models.images,
    "t5": models.t5_inputs,
    "pairs": lambda: models.tokens(5, models.WIDTH),
}


def family(kind, count=2):
    """A base and donors of its architecture, all weights different."""
    made = []
    for seed in range(count + 1):
        model = BUILDERS[kind]()
        made.append(models.randomized(model, seed=10 + seed))
    return made[0], made[1:]


def kernels(layer, name):
    role, part = name.split("_")
    return models.array(getattr(layer.experts.projections[role], part))


@pytest.mark.thinned
@pytest.mark.parametrize("kind", BUILDERS)
def test_experts_are_the_donors_and_the_rest_their_mean(kind, tmp_path):
    base, others = family(kind)
    before = [models.weights(model) for model in (base, *others)]
    moe = ku.upcycle_model(
        base,
        4,
        router="top_k",
        expert_init=ku.BranchTrainMix(others),
        seed=0,
    )
    sites = [ku.find_feed_forwards(each) for each in others]
    _, places = pairing.converted(base, moe)
    assert places
    for site, layer in places:
        for name in site.kernels:
            stacked = kernels(layer, name)
            for expert in range(4):
                donor = sites[expert // 2][site.index].kernels[name]
                np.testing.assert_array_equal(
                    stacked[expert].reshape(donor.shape), models.array(donor)
                )
    # Of every other weight, found layer by layer.
    lists = [[v for _, v in expert_weights.float_weights(m)] for m in others]
    own = [v for _, v in expert_weights.float_weights(base)]
    number = {id(v): place for place, v in enumerate(own)}
    checked = 0
    for pair in pairing.of_whole_experts(base, moe):
        if pair.relation == pairing.COPIED and id(pair.dense) in number:
            place = number[id(pair.dense)]
            values = [models.array(each[place]) for each in lists]
            np.testing.assert_allclose(
                models.array(pair.sparse),
                (values[0] + values[1]) / 2,
                rtol=1e-6,
                atol=1e-7,
            )
            checked += 1
    assert checked > 2
    for model, weights in zip((base, *others), before, strict=True):
        models.assert_same_weights(model, weights)
    moe.save(tmp_path / "moe.keras")
    loaded = keras.models.load_model(tmp_path / "moe.keras")
    models.assert_same_weights(loaded, moe)
    inputs = INPUTS[kind]()
    np.testing.assert_allclose(
        models.output(loaded, inputs), models.output(moe, inputs), atol=1e-5
    )


@pytest.mark.thinned
@pytest.mark.parametrize("kind", BUILDERS)
def test_donors_that_equal_the_base_make_the_dense_model(kind):
    base = BUILDERS[kind]()
    clones = []
    for _ in range(3):
        clone = BUILDERS[kind]()
        clone.set_weights(base.get_weights())
        clones.append(clone)
    moe = ku.upcycle_model(
        base, 3, router="top_k", expert_init=ku.BranchTrainMix(clones)
    )
    for pair in pairing.of_whole_experts(base, moe):
        if pair.layer is None:  # the mean of equals, to the bit
            np.testing.assert_array_equal(
                models.array(pair.sparse), models.array(pair.dense)
            )
    report = ku.verify_upcycle(base, moe, INPUTS[kind]())
    assert report.relative_difference < 1e-5


@pytest.mark.one_backend
def test_the_base_may_be_a_donor_and_keep_its_other_weights():
    base, others = family("pairs")
    init = ku.BranchTrainMix(others, other_weights="base", include_base=True)
    moe = ku.upcycle_model(base, 6, expert_init=init, layers="all")
    _, places = pairing.converted(base, moe)
    up = [ku.find_feed_forwards(m) for m in (base, *others)]
    for site, layer in places:
        stacked = kernels(layer, "up_kernel")
        for expert in range(6):
            np.testing.assert_array_equal(
                stacked[expert],
                models.array(up[expert // 2][site.index].kernels["up_kernel"]),
            )
    np.testing.assert_array_equal(
        models.array(moe.get_layer("head").kernel),
        models.array(base.get_layer("head").kernel),
    )
    # With the average, the base counts among the donors.
    init = ku.BranchTrainMix(others, include_base=True)
    moe = ku.upcycle_model(base, 3, expert_init=init)
    heads = [models.array(m.get_layer("head").kernel) for m in (base, *others)]
    np.testing.assert_allclose(
        models.array(moe.get_layer("head").kernel),
        np.mean(heads, axis=0),
        atol=1e-6,
    )


@pytest.mark.one_backend
def test_blocks_that_stay_dense_are_averaged_too():
    base, others = family("pairs")
    moe = ku.upcycle_model(base, 2, expert_init=ku.BranchTrainMix(others))
    mean = sum(models.array(m.get_layer("up_0").kernel) for m in others) / 2
    np.testing.assert_allclose(
        models.array(moe.get_layer("up_0").kernel), mean, atol=1e-6
    )


@pytest.mark.one_backend
def test_frozen_layers_and_compile_are_the_bases():
    base, others = family("pairs")
    base.get_layer("head").trainable = False
    base.compile(keras.optimizers.SGD(0.5), "mse")
    moe = ku.upcycle_model(base, 2, expert_init=ku.BranchTrainMix(others))
    assert not moe.get_layer("head").trainable
    assert float(moe.optimizer.learning_rate) == 0.5
    y = np.ones((4, models.CLASSES), "float32")
    moe.fit(models.tokens(4, models.WIDTH), y, verbose=0)


def test_half_precision_donors_are_averaged_in_float32():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("bfloat16")
    try:
        made = [models.dense_pairs(name=f"half_{n}") for n in range(4)]
    finally:
        keras.config.set_dtype_policy(policy)
    for model, value in zip(made, (0.0, 256.0, 1.0, 1.0), strict=True):
        for variable in model.weights:
            variable.assign(ops.full(variable.shape, value, variable.dtype))
    moe = ku.upcycle_model(made[0], 3, expert_init=ku.BranchTrainMix(made[1:]))
    head = moe.get_layer("head").kernel
    assert keras.backend.standardize_dtype(head.dtype) == "bfloat16"
    # 256 + 1 is 256 in bfloat16.
    np.testing.assert_array_equal(models.array(head), 86.0)


def test_weights_from_files_are_donors(tmp_path):
    base, others = family("pairs")
    files = []
    for number, model in enumerate(others):
        files.append(tmp_path / f"{number}.npz")
        ku.ExpertWeights.from_model(model, other_weights=True).save(files[-1])
    loaded = [ku.ExpertWeights.load(path) for path in files]
    made = [
        ku.upcycle_model(base, 2, expert_init=ku.BranchTrainMix(d), seed=0)
        for d in (others, loaded)
    ]
    models.assert_same_weights(*made)


# What goes wrong.


def sparse_donor():
    return ku.upcycle_model(models.dense_pairs(), 2)


def broken_donor():
    model = models.dense_pairs()
    head = model.get_layer("head").kernel
    head.assign(ops.full(head.shape, np.nan))
    return model


def other_activation():
    x = inputs = keras.Input((models.WIDTH,), name="features")
    for block in range(2):
        hidden = keras.layers.Dense(models.HIDDEN, "relu")(x)
        down = keras.layers.Dense(models.WIDTH, name=f"d{block}")(hidden)
        x = keras.layers.add([x, down])
    return keras.Model(inputs, keras.layers.Dense(models.CLASSES)(x))


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("donor", "expected"),
    [
        (sparse_donor, "Donor 1 must be dense"),
        (broken_donor, "Donor 1's weights must be finite.*head"),
        (models.sequential, "Donor 1 must be of the class"),
        (lambda: models.dense_pairs(blocks=3), "Donor 1 must have the weights"),
        (other_activation, "activation 'relu'.*'gelu'"),
        (
            lambda: ku.ExpertWeights.from_model(
                models.vit_backbone(), other_weights=True
            ),
            "Donor 1 must have the weights",
        ),
        (
            lambda: ku.ExpertWeights.from_model(
                models.t5_backbone(), other_weights=True
            ),
            "Donor 1 must have the 2 feed-forward blocks",
        ),
    ],
)
def test_a_donor_that_does_not_fit_changes_nothing(donor, expected):
    base = models.dense_pairs()
    before = models.weights(base)
    init = ku.BranchTrainMix([models.dense_pairs(), donor()])
    with pytest.raises(ku.UpcycleError, match=expected):
        ku.upcycle_model(base, 2, expert_init=init)
    models.assert_same_weights(base, before)


@pytest.mark.one_backend
def test_bad_arguments_are_refused():
    base = models.dense_pairs()
    with pytest.raises(ValueError, match=r"at least one donor.*empty"):
        ku.BranchTrainMix([])
    with pytest.raises(TypeError, match="number 1 of type str"):
        ku.BranchTrainMix([base, "model"])
    with pytest.raises(ValueError, match="other_weights='mean'"):
        ku.BranchTrainMix([base], other_weights="mean")
    bare = ku.ExpertWeights.from_model(base)
    with pytest.raises(ValueError, match=r'donor 0.*other_weights="base"'):
        ku.BranchTrainMix([bare])
    init = ku.BranchTrainMix([bare] * 3, other_weights="base")
    assert repr(init) == "BranchTrainMix(3 donors)"
    with pytest.raises(ValueError, match=r"num_experts=4 with 3.*Ask for 6"):
        ku.upcycle_model(base, 4, expert_init=init)
    with pytest.raises(NotImplementedError, match="order"):
        donors.FromDonors([base], "donor").order(2)


# ExpertWeights.


def test_an_expert_is_kept_in_one_file(tmp_path):
    model = models.t5_lm()
    expert = ku.ExpertWeights.from_model(
        model, other_weights=True, description="step 3"
    )
    sites = ku.find_feed_forwards(model)
    assert len(expert.blocks) == len(sites) == 4
    for site, block in zip(sites, expert.blocks, strict=True):
        assert block.keys() == site.kernels.keys()
        for name, value in block.items():
            assert value.dtype == "float32"
            np.testing.assert_array_equal(
                value, models.array(site.kernels[name])
            )
    path = tmp_path / "expert.npz"
    expert.save(path)
    again = ku.ExpertWeights.load(path)
    assert again.description == "step 3"
    assert "step 3" in repr(again)
    for (key, one), (other_key, other) in zip(
        expert.items(), again.items(), strict=True
    ):
        assert key == other_key
        np.testing.assert_array_equal(one, other)
    assert [p.name for p in tmp_path.iterdir()] == ["expert.npz"]


@pytest.mark.one_backend
def test_an_expert_is_a_copy():
    model = models.dense_pairs()
    expert = ku.ExpertWeights.from_model(model)
    before = expert.blocks[0]["up_kernel"].copy()
    model.get_layer("up_0").kernel.assign_add(
        ops.ones((models.WIDTH, models.HIDDEN))
    )
    np.testing.assert_array_equal(expert.blocks[0]["up_kernel"], before)


@pytest.mark.one_backend
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "expert.npz"
    expert = ku.ExpertWeights.from_model(models.dense_pairs())
    expert.save(path)
    old = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space"):
        expert.save(path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["expert.npz"]


@pytest.mark.one_backend
def test_other_files_are_no_experts(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    (tmp_path / "text.npz").write_text("no")
    for name in ("other.npz", "text.npz"):
        with pytest.raises(ValueError, match=f"Received: .*{name}"):
            ku.ExpertWeights.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        ku.ExpertWeights.load(tmp_path / "missing.npz")


@pytest.mark.one_backend
def test_an_expert_needs_a_dense_model_with_blocks():
    with pytest.raises(ku.UpcycleError, match="holds MoE layers"):
        ku.ExpertWeights.from_model(sparse_donor())
    bare = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    with pytest.raises(ku.UpcycleError, match="with none"):
        ku.ExpertWeights.from_model(bare)
    adapted = models.dense_pairs()
    adapted.get_layer("up_0").enable_lora(2)
    with pytest.raises(ku.UpcycleError, match=r"LoRA adapters.*up_0"):
        ku.ExpertWeights.from_model(adapted)
    with pytest.raises(ValueError, match="at least one feed-forward"):
        ku.ExpertWeights([])
