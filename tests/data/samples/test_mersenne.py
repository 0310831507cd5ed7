"""The random streams of C++: golden numbers."""

from megalith.data.samples.mersenne import mt19937, mt19937_64


def test_streams():
    assert mt19937(1234, 3).tolist() == [822569775, 2137449171, 2671936806]
    assert mt19937_64(1235, 3).tolist() == [12475983374653888083, 573922149886606219, 5802434057304372554]
    assert mt19937_64(5489, 10_000)[-1] == 9981545732273789042  # the number that the C++ standard gives


def test_any_count_begins_the_same():
    whole = mt19937_64(7, 1000)
    assert all((mt19937_64(7, count) == whole[:count]).all() for count in (0, 1, 311, 312, 313, 999))
