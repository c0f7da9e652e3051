from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.order import Index, Order


def permutation(seed: int, epoch: int, episodes: int, window: int | None = None) -> Index:
    """p_epoch as a whole: int64 [E]."""
    order = Order(seed, episodes, window or episodes)
    return order.episode(np.array([epoch]), np.arange(episodes))


@given(
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 2**40),
    episodes=st.integers(1, 300),
    window=st.integers(1, 300),
)
def test_every_epoch_is_a_permutation(seed: int, epoch: int, episodes: int, window: int) -> None:
    order = permutation(seed, epoch, episodes, min(window, episodes))
    assert sorted(order.tolist()) == list(range(episodes))


def test_any_place_of_any_epoch_is_found_without_the_places_before_it() -> None:
    order = Order(seed=5, episodes=100_003, window=100_003)
    whole = permutation(5, 7, 100_003)
    places = np.array([0, 99_999, 12_345])
    assert order.episode(np.array([7]), places).tolist() == whole[places].tolist()
    mixed = order.episode(np.array([3, 7, 9]), places)
    assert mixed[1] == whole[99_999]
    assert len(np.unique(whole)) == 100_003


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {
        tuple(permutation(seed, epoch, 20).tolist())
        for seed, epoch in itertools.product((-1, 0, 1, 2**64 + 1), range(50))
    }
    assert len(orders) == 200


def test_all_orders_of_few_episodes_are_about_equally_frequent() -> None:
    for episodes, orders, each in ((3, 6, 200), (4, 24, 200), (5, 120, 200), (7, 5040, 20)):
        epochs = np.arange(each * orders)[:, None]
        order = Order(seed=1, episodes=episodes, window=episodes)
        index = np.broadcast_to(np.arange(episodes), (len(epochs), episodes))
        codes = order.episode(epochs, index) @ episodes ** np.arange(episodes)
        _, counts = np.unique(codes, return_counts=True)
        assert len(counts) == orders
        # chi-square with orders - 1 degrees of freedom: this is five standard deviations
        chi_square = ((counts - each) ** 2 / each).sum()
        assert chi_square < (orders - 1) + 5 * np.sqrt(2 * (orders - 1))


def test_neighbours_of_an_order_are_not_neighbours_of_the_store() -> None:
    order = permutation(3, 0, 20_000)
    assert (np.abs(np.diff(order)) == 1).sum() < 15  # by chance 2
    assert abs(np.corrcoef(order, np.arange(20_000))[0, 1]) < 0.04  # by chance 0.007


def test_a_windowed_order_stays_in_one_window_after_another() -> None:
    episodes, window = 1000, 64
    order = Order(seed=2, episodes=episodes, window=window)
    for epoch in (0, 1):
        whole = permutation(2, epoch, episodes, window)
        for slot in range(-(-episodes // window)):
            played = whole[slot * window : (slot + 1) * window]
            first = order.window_start(epoch, slot)
            expected = (first + np.arange(len(played))) % episodes
            assert sorted(played.tolist()) == sorted(expected.tolist())
            assert played.tolist() != expected.tolist()
    assert order.window_start(0, 3) != order.window_start(1, 3)
