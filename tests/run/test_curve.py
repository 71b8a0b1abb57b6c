
import pytest

from tasks.run.checkpoint import latest, save
from tasks.run.curve import Curve, plot


def test_the_file_holds_every_bit_in_a_fixed_order(tmp_path):
    curve = Curve(["score", "kl_nats"])
    curve.add(20, kl_nats=1e-300, score=-0.0)
    curve.add(10, kl_nats=0.1 + 0.2, score=1)
    curve.add(30, score=-2.5)
    path = curve.write(tmp_path / "artifacts/ppo/curve.csv")
    assert path.read_text() == "step,score,kl_nats\n10,1.0,0.30000000000000004\n20,-0.0,1e-300\n30,-2.5,\n"


def test_a_step_that_is_logged_again_has_one_row():
    curve = Curve(["loss", "accuracy"])
    curve.add(1, loss=3)
    curve.add(1, accuracy=0.5)
    curve.add(1, loss=2)
    assert curve.rows == [{"step": 1, "loss": 2.0, "accuracy": 0.5}]


def test_an_unknown_column_is_refused():
    with pytest.raises(ValueError, match="curve: los is none of the columns loss"):
        Curve(["loss"]).add(1, los=1)


def test_rows_travel_through_a_checkpoint(tmp_path):
    curve = Curve(["loss"])
    curve.add(1, loss=1 / 3)
    save(tmp_path, 1, {"curve": curve.rows})
    again = Curve(["loss"], latest(tmp_path).state["curve"])
    again.add(2, loss=0)
    assert again.rows == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 0.0}]


def test_a_log_history_becomes_a_curve():
    log = [
        {"loss": 2.0, "epoch": 0.1, "step": 1},
        {"eval_loss": 1.5, "eval_accuracy": 0.6, "eval_runtime": 3, "step": 1},
        {"eval_loss": 1.0, "step": 2},
        {"train_runtime": 1, "step": 2},
    ]
    assert Curve.of_log(log, ["loss"]).rows == [{"step": 1, "loss": 2.0}]
    evaluated = Curve.of_log(log, ("eval_loss", "eval_accuracy"), ("loss", "accuracy"))
    assert evaluated.rows == [{"step": 1, "loss": 1.5, "accuracy": 0.6}, {"step": 2, "loss": 1.0}]
    assert evaluated.points("accuracy") == ([1], [0.6])


def test_the_same_curve_draws_the_same_picture(tmp_path):
    def draw(name, last):
        curve = Curve(["score", "kl_nats"], [{"step": 1, "score": 0, "kl_nats": last}])
        return plot(tmp_path / "reports" / name, curve, ["score", "kl_nats"], "PPO").read_bytes()

    picture = draw("a.png", 1.0)
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert draw("b.png", 1.0) == picture and draw("c.png", 2.0) != picture
    assert b"Software" not in picture and b"tIME" not in picture


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_and_the_file_stays(tmp_path, bad):
    curve = Curve(["loss", "accuracy"])
    curve.add(3, loss=1.0)
    path = curve.write(tmp_path / "curve.csv")
    before = path.read_text()
    curve.add(7, accuracy=bad)
    with pytest.raises(ValueError, match=rf"curve\.csv, step 7: accuracy is {bad}$"):
        curve.write(path)
    assert path.read_text() == before
