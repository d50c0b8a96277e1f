"""Plans of an epoch: every example once, the same steps for any number of processes, micro-batches within budget."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellglot.train.batches import EpochPlan, steps_per_epoch

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=60).map(np.array)


def examples_of(step):
    return sorted(e for micros in step for micro in micros if micro.counts for e in micro.examples)


@settings(max_examples=80, deadline=None)
@given(lengths, st.integers(1, 17), st.integers(1, 100), st.integers(1, 4), st.booleans())
def test_every_example_once_within_budget_and_equally_many_micro_batches(lengths, batch, tokens, processes, shuffle):
    plan = EpochPlan(
        lengths, batch_size=batch, max_tokens=tokens, n_processes=processes, shuffle=shuffle, seed=1, epoch=2
    )
    alone = EpochPlan(lengths, batch_size=batch, max_tokens=10**6, shuffle=shuffle, seed=1, epoch=2)
    assert len(plan) == steps_per_epoch(len(lengths), batch)
    seen = []
    for i in range(len(plan)):
        step = plan.step(i)
        assert len(step) == processes
        assert len({len(micros) for micros in step}) == 1
        assert examples_of(step) == examples_of(alone.step(i))
        seen += examples_of(step)
        for micro in (m for micros in step for m in micros):
            padded = max(lengths[list(micro.examples)]) * len(micro.examples)
            assert padded <= tokens or len(micro.examples) == 1
    assert sorted(seen) == list(range(len(lengths)))


def test_order_is_a_function_of_seed_and_epoch():
    lengths = np.arange(100) % 13

    def order(seed, epoch):
        return EpochPlan(lengths, batch_size=8, max_tokens=99, seed=seed, epoch=epoch).order.tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_grouped_by_length_in_megabatches_longest_first():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 2048, size=1000)
    plan = EpochPlan(lengths, batch_size=8, max_tokens=10**9)
    assert lengths[plan.order[0]] == lengths.max()
    megabatch = min(1000 // 32, 50) * 8
    for start in range(0, 1000, megabatch):
        part = lengths[plan.order[start : start + megabatch]]
        # In descending order, but for the place where the longest of all was taken from or put.
        assert (np.diff(part) > 0).sum() <= 1
    padded = sum(max(lengths[list(m.examples)]) * len(m.examples) for i in range(len(plan)) for (m,) in plan.step(i))
    assert padded / lengths.sum() < 1.1


def test_evaluation_keeps_the_order():
    assert EpochPlan(np.arange(9), batch_size=4, max_tokens=9, shuffle=False).order.tolist() == list(range(9))


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_get_about_equal_padded_tokens(processes):
    lengths = np.random.default_rng(0).integers(500, 2048, size=512)
    plan = EpochPlan(lengths, batch_size=64, max_tokens=10**9, n_processes=processes)
    for i in range(len(plan)):
        cost = [sum(max(lengths[list(m.examples)]) * len(m.examples) for m in micros) for micros in plan.step(i)]
        assert max(cost) / (sum(cost) / processes) < 1.1
