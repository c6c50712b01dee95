"""The learning rate of every step."""

import pytest

from trainer.training.optimizer import OptimizerConfig
from trainer.training.schedule import ScheduleConfig, learning_rate


def rates(taken: int, total: int | None, **schedule: object) -> list[float]:
    config, chosen = OptimizerConfig(learning_rate=1.0), ScheduleConfig(**schedule)
    return [round(learning_rate(config, chosen, step, step / taken, total), 6) for step in range(taken)]


def test_a_constant_rate_needs_no_end() -> None:
    assert rates(3, None) == [1.0, 1.0, 1.0]


def test_the_warmup_rises_in_equal_steps_to_the_full_rate() -> None:
    assert rates(5, 5, warmup=3) == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_linear_decay_starts_after_the_warmup_and_would_end_after_the_last_step() -> None:
    assert rates(6, 6, kind="linear", warmup=1) == [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]


def test_a_cosine_decay_is_half_way_down_in_the_middle() -> None:
    assert rates(4, 4, kind="cosine") == [1.0, 0.853553, 0.5, 0.146447]


def test_the_decay_stays_at_the_minimum() -> None:
    assert rates(6, 6, kind="linear", steps=4, minimum=0.2) == [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]


def test_a_decay_over_data_follows_the_data() -> None:
    assert rates(4, None, kind="linear", over="data") == [1.0, 0.75, 0.5, 0.25]
    assert rates(4, None, kind="linear", over="data", warmup=1) == [0.5, 0.75, 0.5, 0.25]


def test_a_decay_over_steps_without_an_end_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r'a cosine schedule over steps needs its last step, .* set schedule.over = "data" or schedule.steps',
    ):
        rates(2, None, kind="cosine")


def test_wsd_keeps_the_full_rate_up_to_a_decay_of_the_given_number_of_steps() -> None:
    assert rates(6, 6, kind="wsd", warmup=1, decay=2) == [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]
    assert rates(8, 8, kind="wsd", decay=4, minimum=0.2) == [1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4]
    assert rates(6, 9, kind="wsd", decay=2, steps=4) == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]


def test_the_decay_of_wsd_may_be_a_share_of_the_steps_or_of_the_data() -> None:
    assert rates(8, 8, kind="wsd", decay=0.5) == [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(8, None, kind="wsd", over="data", decay=0.5) == [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_a_share_below_one_step_is_one_step() -> None:
    assert rates(3, 3, kind="wsd", decay=0.01) == [1.0, 1.0, 1.0]
    assert rates(4, 4, kind="wsd", decay=0.01, steps=3) == [1.0, 1.0, 1.0, 0.0]


def test_the_form_1_sqrt_falls_with_the_square_root_of_the_share() -> None:
    assert rates(5, 5, kind="wsd", decay=4, decay_form="1-sqrt") == [1.0, 1.0, 0.5, 0.292893, 0.133975]
    assert rates(5, 4, kind="wsd", decay=4, decay_form="1-sqrt", minimum=0.5) == [1.0, 0.75, 0.646447, 0.566987, 0.5]


@pytest.mark.parametrize("decay", [1, 7, 0.3])
@pytest.mark.parametrize("minimum", [0.0, 0.1, 0.3, 1 / 3, 0.7])
def test_the_stable_rates_of_wsd_are_those_of_a_constant_schedule_to_the_bit(decay: float, minimum: float) -> None:
    config = OptimizerConfig(learning_rate=3e-4)
    constant, wsd = ScheduleConfig(warmup=3), ScheduleConfig(kind="wsd", warmup=3, decay=decay, minimum=minimum)
    for step in range(14):
        assert learning_rate(config, wsd, step, 0.0, 20) == learning_rate(config, constant, step, 0.0, None)


def test_a_warmup_and_decay_longer_than_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match="warmup 3 and a decay of 4 steps exceed the 6 steps of the schedule"):
        rates(6, 6, kind="wsd", warmup=3, decay=4)
    assert rates(7, 7, kind="wsd", warmup=3, decay=4)[3:5] == [1.0, 0.75]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"warmup": -1}, "warmup -1"),
        ({"minimum": 1.5}, "minimum 1.5"),
        ({"warmup": 10, "steps": 10}, "steps 10 must exceed warmup 10"),
        ({"over": "data", "steps": 10}, "steps 10 has no meaning"),
        ({"kind": "wsd"}, 'kind = "wsd" needs the length of its decay'),
        ({"kind": "wsd", "decay": 0}, "decay 0 must be 1 to 1000000000000 steps"),
        ({"kind": "wsd", "decay": 10**13}, "decay 10000000000000 must be 1 to"),
        ({"kind": "wsd", "decay": 0.0}, "decay 0.0 must be a share above 0.0 and at most 1.0"),
        ({"kind": "wsd", "decay": 1.5}, "decay 1.5 must be a share"),
        ({"kind": "wsd", "decay": float("nan")}, "decay nan must be a share"),
        ({"kind": "wsd", "decay": 5, "over": "data"}, "decay 5 is a number of steps"),
        ({"kind": "wsd", "decay": 8, "steps": 10, "warmup": 3}, "warmup 3 and a decay of 8 steps exceed the 10 steps"),
        ({"kind": "linear", "decay": 5}, 'belong to kind = "wsd", but kind is "linear"; remove them'),
        ({"decay_form": "1-sqrt"}, 'belong to kind = "wsd", but kind is "constant"'),
    ],
)
def test_an_invalid_schedule_is_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**table)
