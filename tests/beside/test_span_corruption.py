"""Span corruption: by hand, by its invariants, and against KerasHub."""

import numpy as np
import pytest
import span_corruption as sc
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.one_backend

TEXT = "Thank you for inviting me to your party last week .".split()
SENTINELS = np.arange(900, 1000)

lengths = st.integers(2, 300)
densities = st.floats(0.01, 0.99)
mean_spans = st.floats(1, 20)
seeds = st.integers(0, 2**32)


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(3, 900, count)


def runs(mask):
    """Lengths of the runs of `True`."""
    text = "".join("x" if dropped else " " for dropped in mask)
    return [len(run) for run in text.split()]


def test_figure_2_of_the_paper():
    vocabulary = [*TEXT, "<X>", "<Y>", "<Z>"]
    tokens = np.arange(len(TEXT))
    mask = np.isin(TEXT, ["for", "inviting", "last"])
    inputs, targets = sc.drop(tokens, mask, np.arange(11, 14))
    assert " ".join(vocabulary[i] for i in inputs) == (
        "Thank you <X> me to your party <Y> week ."
    )
    assert " ".join(vocabulary[i] for i in targets) == (
        "<X> for inviting <Y> last <Z>"
    )


@pytest.mark.parametrize(
    ("mask", "inputs", "targets"),
    [
        ([0, 0, 0], [5, 6, 7], [90]),
        ([1, 0, 0], [90, 6, 7], [90, 5, 91]),
        ([0, 1, 1], [5, 90], [90, 6, 7, 91]),
        ([1, 0, 1], [90, 6, 91], [90, 5, 91, 7, 92]),
        ([1, 1, 1], [90], [90, 5, 6, 7, 91]),
    ],
)
def test_spans_at_the_ends_and_everywhere(mask, inputs, targets):
    received = sc.drop([5, 6, 7], mask, [90, 91, 92])
    assert [part.tolist() for part in received] == [inputs, targets]
    assert sc.restore(*received, [90, 91, 92]).tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("length", "density", "mean_span", "expected"),
    [
        (512, 0.15, 3.0, (77, 26)),  # T5's own: 76.8 tokens, 25.7 spans
        (2, 0.15, 3.0, (1, 1)),
        (10, 0.99, 3.0, (9, 1)),  # a token must stay; then one span fits
        (10, 0.5, 1.0, (5, 5)),
        (10, 0.8, 1.0, (8, 2)),  # two tokens stay: each goes before a span
        (10, 0.01, 20.0, (1, 1)),
    ],
)
def test_how_much_is_dropped(length, density, mean_span, expected):
    assert sc.counts(length, density, mean_span) == expected


@settings(max_examples=150, deadline=None)
@given(length=lengths, density=densities, mean_span=mean_spans, seed=seeds)
def test_what_is_dropped_can_be_put_back(length, density, mean_span, seed):
    tokens = ids(length, seed)
    tokens_dropped, spans = sc.counts(length, density, mean_span)
    # More sentinels than T5 has, where spans are many.
    sentinels = np.arange(1000, 1001 + spans)
    rng = np.random.default_rng(seed)
    inputs, targets = sc.corrupt(tokens, sentinels, rng, density, mean_span)
    np.testing.assert_array_equal(
        sc.restore(inputs, targets, sentinels), tokens
    )
    assert (len(inputs), len(targets)) == sc.lengths(length, density, mean_span)
    # Each sentinel once and in order; one more in the targets.
    found = [part[part >= 1000].tolist() for part in (inputs, targets)]
    assert found == [sentinels[:-1].tolist(), sentinels.tolist()]
    assert len(targets) - len(found[1]) == tokens_dropped


@settings(max_examples=150, deadline=None)
@given(length=lengths, density=densities, mean_span=mean_spans, seed=seeds)
def test_the_mask_has_the_spans_that_were_asked_for(
    length, density, mean_span, seed
):
    tokens, spans = sc.counts(length, density, mean_span)
    rng = np.random.default_rng(seed)
    mask = sc.noise_mask(length, rng, density, mean_span)
    assert mask.shape == (length,)
    assert sum(runs(mask)) == tokens
    assert len(runs(mask)) == spans
    assert not mask[0]
    assert mask[-1]


def test_every_way_to_divide_is_as_likely():
    """4 dropped in 2 spans: 1+3, 2+2 and 3+1, a third each."""
    rng = np.random.default_rng(0)
    firsts = [runs(sc.noise_mask(8, rng, 0.5, 2.0))[0] for _ in range(3000)]
    shares = np.bincount(firsts)[1:] / 3000
    # Three standard deviations of a share of 1/3 over 3000 draws are 0.026.
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)


def test_a_seed_gives_the_same_spans_and_another_seed_others():
    first, second, other = (
        sc.corrupt(ids(200), SENTINELS, np.random.default_rng(seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert not np.array_equal(first[0], other[0])


def test_packing_by_hand():
    x, labels, weights = sc.pack([[5, 9, 7]], [[9, 6]], 5, 4, 10)
    assert {key: value.tolist() for key, value in x.items()} == {
        "encoder_token_ids": [[5, 9, 7, 1, 0]],
        "encoder_padding_mask": [[True, True, True, True, False]],
        "decoder_token_ids": [[0, 9, 6, 1]],
        "decoder_padding_mask": [[True, True, True, True]],
    }
    assert labels.tolist() == [[9, 6, 1, 0]]
    assert weights.tolist() == [[1, 1, 1, 0]]


def test_errors_say_what_to_do():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"Received: 1\. Use longer texts"):
        sc.corrupt([5], SENTINELS, rng)
    with pytest.raises(ValueError, match=r"between 0 and 1.*density=1\.5"):
        sc.counts(10, density=1.5)
    with pytest.raises(ValueError, match=r"at least 1.*mean_span=nan"):
        sc.counts(10, mean_span=float("nan"))
    with pytest.raises(ValueError, match=r"ids \[901\]\. Take <extra_id"):
        sc.corrupt([5, 901, 6], SENTINELS, rng)
    with pytest.raises(ValueError, match=r"2 spans need 3 sentinels.*shorter"):
        sc.drop([5, 6, 7], [1, 0, 1], [90, 91])
    with pytest.raises(ValueError, match=r"sentinels \[90\].*with \[91\]"):
        sc.restore([5, 91], [90, 6, 91], [90, 91])
    with pytest.raises(ValueError, match=r"targets with \[90\] at \[0\] of 2"):
        sc.restore([5, 90], [90, 6], [90, 91])


@pytest.mark.parametrize("outside", [-1, 10])
@pytest.mark.parametrize("side", [0, 1])
def test_ids_outside_the_vocabulary_are_refused(outside, side):
    texts = [[[5]], [[5]]]
    texts[side] = [[5, outside]]
    with pytest.raises(ValueError, match=rf"0 to 9\. Received: \[{outside}\]"):
        sc.pack(*texts, 4, 4, 10)


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match=r"`encoder_length`.*4.*Received: 3"):
        sc.pack([[5, 6, 7]], [[5]], 3, 4, 10)
    with pytest.raises(ValueError, match=r"`decoder_length`.*4.*Received: 3"):
        sc.pack([[5]], [[5, 6, 7]], 4, 3, 10)
