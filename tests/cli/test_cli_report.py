"""`keras-upcycle report`: a monitor's log, read from the shell."""

import json

import numpy as np
import pytest

from keras_upcycle import cli
from keras_upcycle.analysis import router_log
from keras_upcycle.routing.statistics import RouterReading

pytestmark = pytest.mark.one_backend


def reading(layer, step, load, dropped=0.0):
    return RouterReading(
        step=step,
        layer=layer,
        steps=10,
        tokens=100,
        load=np.array(load),
        dropped=dropped,
        unrouted=0.0,
        entropy=0.9,
        confidence=0.5,
        weight=1.0,
        losses={"load_balance": 1.25},
        weighted_loss=0.0125,
    )


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "routers.csv"
    router_log.append(
        path,
        [
            reading("first", 10, [0.5, 0.5]),
            reading("second", 10, [1.0, 0.0]),
            reading("first", 20, [0.25, 0.75], dropped=0.3),
            reading("second", 20, [0.5, 0.5]),
        ],
    )
    return path


def test_the_latest_reading_of_each_block_is_printed(log, capsys):
    assert cli.main(["report", str(log)]) == 0
    printed = capsys.readouterr().out
    assert "2 blocks, 4 readings, steps 0 to 20." in printed
    (first,) = [line for line in printed.splitlines() if "first" in line]
    assert first.split()[:5] == ["first", "20", "1.50x", "0", "30.0%"]
    assert "1.2500" in first


def test_json_holds_loads(log, capsys):
    assert cli.main(["report", str(log), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["blocks"]["first"]["load"] == [0.25, 0.75]
    assert record["blocks"]["second"]["dead"] == []
    assert record["passed"] is True


def test_checks_set_the_exit_code(log, capsys):
    checks = ["--max-dropped", "0.2", "--no-dead"]
    assert cli.main(["report", str(log), *checks]) == 1
    assert "first: 30.0% of the assignments" in capsys.readouterr().out
    assert cli.main(["report", str(log), "--max-dropped", "0.3"]) == 0
    router_log.append(log, [reading("second", 30, [0.0, 1.0])])
    assert cli.main(["report", str(log), "--no-dead"]) == 1
    assert "second: experts [0]" in capsys.readouterr().out


def test_a_picture_is_drawn(log, tmp_path, capsys):
    picture = tmp_path / "load.png"
    assert cli.main(["report", str(log), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out


def test_what_is_no_log_is_refused(tmp_path, capsys):
    missing = tmp_path / "missing.csv"
    assert cli.main(["report", str(missing)]) == 2
    assert "missing.csv" in capsys.readouterr().err
    other = tmp_path / "other.csv"
    other.write_text("epoch,loss\n")
    assert cli.main(["report", str(other)]) == 2
    assert "written by `RouterMonitor(log=...)`" in capsys.readouterr().err
    empty = tmp_path / "empty.csv"
    empty.write_text(",".join(router_log.COLUMNS) + "\n")
    assert cli.main(["report", str(empty)]) == 2
    assert "none yet" in capsys.readouterr().err
