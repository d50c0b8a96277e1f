"""Plans of an epoch: every example once, the same steps for any number of processes, micro-batches within budget."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellglot.train.batches import EpochPlan, balanced, steps_per_epoch

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=60).map(np.array)


def examples_of(step):
    return sorted(e for micros in step for micro in micros if micro.counts for e in micro.examples)


@settings(max_examples=80, deadline=None)
@given(lengths, st.integers(1, 17), st.integers(1, 100), st.integers(1, 4), st.booleans(), st.booleans())
def test_every_example_once_within_budget_and_equally_many_micro_batches(
    lengths, batch, tokens, processes, shuffle, packed
):
    plan = EpochPlan(
        lengths,
        batch_size=batch,
        max_tokens=tokens,
        packed=packed,
        n_processes=processes,
        shuffle=shuffle,
        seed=1,
        epoch=2,
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
            members = lengths[list(micro.examples)]
            cost = sum(members) if packed else max(members) * len(members)
            assert cost <= tokens or len(members) == 1
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


def lognormal_lengths(n):
    """Cells of 100 to 2,048 tokens, 900 in the middle."""
    rng = np.random.default_rng(0)
    return np.clip(np.exp(rng.normal(np.log(900), 0.6, n)), 100, 2048).astype(int)


@pytest.mark.parametrize("processes", [2, 4, 8, 12])
@pytest.mark.parametrize("max_tokens", [5_000, 10**9])
def test_packed_processes_get_equal_tokens_and_compute(processes, max_tokens):
    """12 cells a process: 1% at the worst step, where equal numbers of cells differ by up to 26%."""
    lengths = lognormal_lengths(1440)
    plan = EpochPlan(lengths, batch_size=144, max_tokens=max_tokens, n_processes=processes, packed=True)
    worst_by_cells = 0.0
    for i in range(len(plan)):
        shares = [[e for m in micros if m.counts for e in m.examples] for micros in plan.step(i)]
        # Attention of V1-6L computes as much as all the rest of a cell of 1,346 tokens.
        for cost in (lengths, lengths * (1 + lengths / 1346)):
            of_share = np.array([cost[share].sum() for share in shares])
            assert of_share.max() < 1.02 * of_share.mean()
        by_cells = [lengths[part].sum() for part in np.array_split(plan.order[i * 144 : (i + 1) * 144], processes)]
        worst_by_cells = max(worst_by_cells, max(by_cells) / np.mean(by_cells))
    assert worst_by_cells > 1.05


def test_packed_micro_batches_of_a_process_are_about_equal():
    """FSDP and ZeRO-3 wait for each other in every micro-batch: those of one turn are to be alike."""
    lengths = lognormal_lengths(1440)
    plan = EpochPlan(lengths, batch_size=144, max_tokens=8192, n_processes=4, packed=True)
    for i in range(len(plan)):
        tokens = np.array([[lengths[list(m.examples)].sum() for m in micros] for micros in plan.step(i)])
        assert tokens.shape[1] > 1
        assert (tokens.max(axis=0) < 1.1 * tokens.mean(axis=0)).all()


def test_packing_takes_the_fewest_micro_batches():
    lengths = np.array([40] + [10] * 9)
    for packed, n in ((True, 2), (False, 3)):
        ((*micros,),) = EpochPlan(lengths, batch_size=10, max_tokens=70, packed=packed).step(0)
        assert len(micros) == n


def test_parts_are_balanced_as_worked_by_hand():
    # 7 | 6 | 5 to the lighter (6) | 4 to the lighter (7) | 3 and 2 to the lighter in turn
    assert balanced(np.array([5, 7, 3, 6, 2, 4]), 2) == [[1, 5, 2], [3, 0, 4]]
    assert balanced(np.array([2, 9]), 3) == [[1], [0], []]
    assert [len(part) for part in balanced(np.zeros(6), 3)] == [2, 2, 2]
