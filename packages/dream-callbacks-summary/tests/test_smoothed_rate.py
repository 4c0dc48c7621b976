import pytest

from dream_callbacks.summary.smoothed_rate import SmoothedRate


def rate_of(smoothing: float, *measurements: tuple[int, float]) -> SmoothedRate:
    rate = SmoothedRate(smoothing)
    for count, time_s in measurements:
        rate.add(count, time_s)
    return rate


def test_the_rate_is_unknown_before_the_first_measurement():
    rate = SmoothedRate(0.1)
    rate.restart(5, 10.0)

    assert rate.per_second is None


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_a_steady_rate_is_known_at_once_for_any_smoothing(smoothing: float):
    assert rate_of(smoothing, (10, 2.0)).per_second == 5.0


def test_without_smoothing_the_rate_is_the_mean_since_the_beginning():
    assert rate_of(0.0, (10, 1.0), (12, 2.0), (30, 4.0)).per_second == 30 / 4


def test_with_a_smoothing_of_one_the_rate_is_the_last_measurement():
    assert rate_of(1.0, (10, 1.0), (12, 2.0), (30, 4.0)).per_second == 18 / 2


def test_the_rate_approaches_a_new_speed_exponentially():
    slow = [(n, float(n)) for n in range(1, 101)]  # 1/s
    fast = [(100 + 10 * n, 100.0 + n) for n in range(1, 23)]  # 10/s

    after_22 = rate_of(0.1, *slow, *fast).per_second

    assert after_22 == pytest.approx(10 - 9 * 0.9**22, rel=1e-3)


def test_time_without_growth_counts_towards_the_next_growth():
    assert rate_of(1.0, (4, 1.0), (4, 3.0), (8, 5.0)).per_second == 4 / 4


def test_a_restart_leaves_out_the_time_since_the_last_measurement():
    rate = rate_of(0.0, (10, 1.0))
    rate.restart(10, 100.0)
    rate.add(20, 101.0)

    assert rate.per_second == 10.0


def test_a_count_that_decreased_restarts_the_measurement():
    assert rate_of(0.0, (10, 1.0), (3, 2.0), (13, 3.0)).per_second == 10.0
