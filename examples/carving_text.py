"""A dense language model carved into experts, against other cuts of it.

    KERAS_BACKEND=jax python examples/carving_text.py --output runs/carving

The demo's trained model of Python's own sources is cut into 16 parts a block,
of which a token meets 4, 8 or 12: by what its neurons do (CMoE), by what they
weigh (k-means, MoEfication), or at random (LLaMA-MoE). Carved, half of the
parts that a token meets are shared, and neurons choose the others; the cuts
below have neither, but a linear router that has learned nothing. Each is tested
at once and after some steps of training, as the dense model is; so is carving
with other groups, without shared neurons, and balanced while it trains.
`--settings` compares settings of carving instead.
"""

import argparse
import pathlib

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras
import numpy as np

from keras_upcycle import tables
from keras_upcycle.demo import language_model, sources, text, training
from keras_upcycle.demo.store import write_json
from keras_upcycle.training import progress

PARTS = 16
MET = (4, 8, 12)
WINDOWS = 256  # of the text, by which neurons are carved
STEPS, RATE, COOL_DOWN = 100, 1e-3, 0.5
DENSE = "dense"
CARVED = {
    "carving": {},
    "carving, groups by k-means of weights": {"grouping": "weights"},
    "carving, random groups": {"grouping": "random"},
}
SLICED = {
    "k-means of weights, linear router": "cluster",
    "random cuts, linear router": "random",
}
NOTHING_SHARED = "carving, nothing shared"
BALANCED = "carving, balanced by biases"
SETTINGS = [
    {"active_neurons": count, "normalize": normalize}
    for normalize in (True, False)
    for count in (1, 4, 10, 16, 32)
]


def main(arguments=None) -> None:
    """Measures everything and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=pathlib.Path, default="runs/carving")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--balance",
        type=float,
        default=0.001,
        help="bias_update_rate of the balanced cut (default: the paper's)",
    )
    parser.add_argument(
        "--settings",
        action="store_true",
        help="compare settings of carving by the validation text, no training",
    )
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    with progress.Reporter() as reporter:
        reporter.line(f"Backend: {keras.backend.backend()}.")
        trial = Trial(args.seeds, args.steps, args.balance, reporter)
        if args.settings:
            reporter.line(settings_table(trial))
            return
        found = trial.run()
        write_json(
            args.output / "results.json",
            {
                "text": trial.text.name,
                "seeds": args.seeds,
                "steps": args.steps,
                "balance": args.balance,
                "found": found,
            },
        )
        reporter.line(f"\n{table(found)}\n\nWritten to {args.output}.")


class Trial:
    """The dense model, the text, and models that are compiled once each."""

    def __init__(self, seeds, steps, balance, reporter):
        self.seeds, self.steps, self.balance = seeds, steps, balance
        self.reporter = reporter
        self.text = sources.standard_library()
        self.dense = text.dense_checkpoint()
        self.compiled = {}

    def run(self) -> list[dict]:
        """A record for each share, way to cut and seed."""
        rows = self._rows(DENSE, DENSE, PARTS, lambda seed: self.dense_again())
        for met in MET:
            shared = met // 2
            for name, settings in CARVED.items():
                rows += self._rows(
                    "carved", name, met, self._carver(met, shared, **settings)
                )
            rows += self._rows(
                BALANCED,
                BALANCED,
                met,
                self._carver(met, shared, balance=self.balance),
            )
            rows += self._rows(
                NOTHING_SHARED, NOTHING_SHARED, met, self._carver(met, 0)
            )
            for name, order in SLICED.items():
                rows += self._rows(
                    "sliced", name, met, self._slicer(met, order)
                )
        return rows

    def dense_again(self):
        """A copy, so that the checkpoint stays as it is."""
        again = keras.models.clone_model(self.dense)
        again.set_weights(self.dense.get_weights())
        return again

    def carved(self, met, shared, seed, balance=0.0, **settings):
        """The dense model carved, `shared` parts of `met` for every token."""
        start = np.random.default_rng([seed, 1]).integers(
            0, len(self.text.train) - 40, WINDOWS
        )
        ids, _ = training.windows(
            self.text.train, start, language_model.Shape.length
        )
        return ku.upcycle_model(
            self.dense,
            PARTS - shared,
            recipe="carving",
            router=ku.CarvingRouter(met - shared, bias_update_rate=balance),
            expert_init=ku.Carving(ids, shared=shared / PARTS, **settings),
            seed=seed,
        )

    def _carver(self, met, shared, **settings):
        return lambda seed: self.carved(met, shared, seed, **settings)

    def _slicer(self, met, order):
        return lambda seed: ku.upcycle_model(
            self.dense,
            PARTS,
            layers="all",
            router=ku.TopKRouter(
                met, capacity_factor=None, load_balance_loss=0.0
            ),
            expert_init=ku.FeedForwardSlices(order, exact=False),
            seed=seed,
        )

    def _rows(self, kind, name, met, make):
        """Tests and trains what `make` gives for each seed.

        Models of a kind are alike but for their values.
        """
        rows = []
        for seed in range(self.seeds):
            made = make(seed)
            if (kind, met) not in self.compiled:
                training.compile_for(
                    made, language_model.adam(RATE), at_once=self._at_once()
                )
                fresh = training.get_state(made)[1]
                self.compiled[kind, met] = made, fresh
            model, fresh = self.compiled[kind, met]
            weights = [np.array(w) for w in made.get_weights()]
            # The first is compiled and takes the others' values.
            weights = [np.array(w) for w in made.get_weights()]
            training.set_state(model, [weights, fresh])
            start = training.held_out(model, self.text.test)
            training.train(
                model,
                self.text.train,
                training.rates(RATE, self.steps, cool_down=COOL_DOWN),
                seed=seed,
            )
            end = training.held_out(model, self.text.test)
            rows.append(
                {
                    "name": name,
                    "met": met,
                    "seed": seed,
                    "start": start["cross_entropy"],
                    "end": end["cross_entropy"],
                }
            )
            self.reporter.line(
                f"{name}, {met} of {PARTS}, seed {seed}: "
                f"{rows[-1]['start']:.4f}, after {self.steps} steps "
                f"{rows[-1]['end']:.4f}"
            )
        return rows

    def _at_once(self):
        return min(training.STRETCH, self.steps)


def settings_table(trial) -> str:
    """Loss on the validation text straight after, for settings of carving."""
    rows = []
    for settings in SETTINGS:
        losses = []
        for met in MET:
            model = trial.carved(met, met // 2, 0, **settings)
            training.compile_for(model, language_model.adam(RATE))
            held_out = training.held_out(model, trial.text.validation)
            losses.append(f"{held_out['cross_entropy']:.4f}")
        rows.append((*map(str, settings.values()), *losses))
    header = (*SETTINGS[0], *(f"{met} of {PARTS}" for met in MET))
    return tables.markdown(header, rows)


def table(found) -> str:
    """Means and spreads over seeds, as Markdown."""
    rows = []
    for met in (PARTS, *MET):
        names = dict.fromkeys(r["name"] for r in found if r["met"] == met)
        for name in names:
            own = [r for r in found if (r["name"], r["met"]) == (name, met)]
            rows.append(
                (
                    f"{met / PARTS:.0%}",
                    name,
                    *(
                        f"{np.mean([r[when] for r in own]):.3f} ± "
                        f"{np.std([r[when] for r in own]):.3f}"
                        for when in ("start", "end")
                    ),
                )
            )
    return tables.markdown(
        ("active", "cut", "loss at once", "loss after training"), rows
    )


if __name__ == "__main__":
    main()
