"""The UpIT example: what it refuses, and one run on texts made up here."""

import json

import keras
import numpy as np
import pytest
import upit_t5

import keras_upcycle as ku
from keras_upcycle.demo.batches import Data
from keras_upcycle.demo.results import Stage

pytestmark = pytest.mark.one_backend

SMALL = (
    "--width 8 --heads 2 --intermediate 8 --blocks 2 --vocabulary 40 "
    "--chunk 16 --batch-size 8 --limit 40 --held-out 0.3 "
    "--pretrain-steps 4 --tune-steps 4 --more-steps 2 --samples 16 "
    "--experts 5"
).split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    kings = "the King a Queen fair sweet lord come hither".split()
    films = "a dull film of great acting and no plot at all".split()
    lines = [" ".join(rng.choice(kings, 8)) for _ in range(150)]
    (folder / "plays.txt").write_text("\n".join(lines) + "\n")
    rows = [" ".join(rng.choice(films, 8)) + "\t1" for _ in range(150)]
    (folder / "reviews.tsv").write_text("\n".join(rows) + "\n")
    return [
        *("--plays", str(folder / "plays.txt")),
        *("--reviews", str(folder / "reviews.tsv")),
    ]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--plays nowhere.txt", "nowhere.txt"),
        ("--data-dir .", "no folder `tiny_shakespeare`"),
        ("--tune-steps 6", "--tune-steps=6"),
        ("--experts 3", "--experts=3"),
    ],
)
def test_it_says_what_is_wrong(options, expected, tmp_path, capsys):
    arguments = [*options.split(), "--output", str(tmp_path / "out")]
    assert upit_t5.main(arguments) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_domains_take_turns():
    domain = np.repeat([0, 1], 20).astype("int32")
    data = Data((domain, domain), (domain, domain), lambda r, *_: r)
    stage = Stage(rounds=1, steps=8, batch_size=5)
    batches = upit_t5.InTurn(data, stage, seed=0)
    kinds = [set(batches[step][1].tolist()) for step in range(len(batches))]
    assert kinds == [{0}, {0}, {1}, {1}, {0}, {0}, {1}, {1}]


@pytest.mark.slow
def test_four_ways_are_tabled_and_drawn(files, tmp_path, capsys):
    assert upit_t5.main([*files, *SMALL, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    figures = written["figures"]
    assert set(figures) == set(upit_t5.COLOURS)
    for name, (found,) in figures.items():
        plays, reviews = found["loss"]
        assert f"| {name} | {plays:.3f} | {reviews:.3f} |" in printed
    assert written["experts"] == [f"step {n}" for n in (1, 2, 3, 4)]
    assert (tmp_path / "upit.png").read_bytes().startswith(b"\x89PNG")
    loaded = keras.models.load_model(tmp_path / "upit.keras")
    # The first block of either stack stays dense.
    assert len(ku.find_feed_forwards(loaded)) == 2
    assert len(list((tmp_path / "experts").iterdir())) == 4
