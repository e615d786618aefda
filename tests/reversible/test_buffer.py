"""The information buffer: exact inverse, bounded, and hardly larger than what was forgotten."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_revflip.reversible import buffer as buffer_module
from lightning_revflip.reversible.buffer import (
    InformationBuffer,
    WordStream,
    information_bits,
    lowest_gate,
    stored_bits,
)
from tests.helpers.passes import normal
from tests.helpers.plain_buffer import plain_divide, plain_multiply
from tests.helpers.properties import examples

LARGEST = 2**31 - 1
gates = st.integers(1, 1023)
states = st.integers(-LARGEST, LARGEST)


def new_buffer(*shape, words=None):
    return InformationBuffer(InformationBuffer.initial_state(*shape), words)


def numbers(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_in_range(buffer):
    assert ((buffer.state >= 2**15) & (buffer.state < 2**31)).all()


def multiply_all(buffer, h, sequence):
    """`h` after each gate of `sequence`, a list; the buffer stays in its interval."""
    history = []
    for gate in sequence:
        buffer.multiply_(h, gate.expand_as(h).contiguous())
        assert_in_range(buffer)
        history.append(h.clone())
    return history


def assert_divide_undoes(buffer, h, sequence, history):
    """Dividing by the gates in reverse passes the same states, bit for bit, and empties it."""
    for gate, before in zip(reversed(sequence), reversed(history), strict=True):
        buffer.divide_(h, gate.expand_as(h).contiguous())
        assert_in_range(buffer)
        assert torch.equal(h, before)
    assert buffer.is_initial()
    assert len(buffer.words) == 0


def assert_reversible(h, sequence):
    start, words = h.clone(), WordStream()
    buffer = new_buffer(*h.shape, words=words)
    history = multiply_all(buffer, h, sequence)
    assert_divide_undoes(buffer, h, sequence, [start, *history[:-1]])


@given(st.lists(st.tuples(states, st.lists(gates, min_size=30, max_size=30)), max_size=8))
@examples(max_examples=100)
def test_divide_restores_every_state_after_any_gates(rows):
    h = numbers([[row[0] for row in rows]])
    assert_reversible(h, list(numbers([row[1] for row in rows]).reshape(len(rows), 30).t()))


@given(st.lists(st.tuples(states, st.lists(gates, min_size=40, max_size=40)), max_size=3))
@examples(max_examples=100)
def test_bits_are_those_of_python_integers(rows):
    words, plain_words = WordStream(), []
    buffer, h = new_buffer(len(rows), words=words), numbers([row[0] for row in rows])
    plain = [(2**15, row[0]) for row in rows]
    steps = list(zip(*(row[1] for row in rows), strict=True))
    for gate in steps:
        buffer.multiply_(h, numbers(gate))
        plain = [plain_multiply(*p, z, plain_words) for p, z in zip(plain, gate, strict=True)]
        assert list(zip(buffer.state.tolist(), h.tolist(), strict=True)) == plain
    assert WordStream(words.pack()).pop(len(words)).tolist() == plain_words
    for gate in reversed(steps):
        buffer.divide_(h, numbers(gate))
        units = list(zip(plain, gate, strict=True))[::-1]  # the last unit's word lies on top
        plain = [plain_divide(*p, z, plain_words) for p, z in units][::-1]
        assert list(zip(buffer.state.tolist(), h.tolist(), strict=True)) == plain
    assert plain == [(2**15, row[0]) for row in rows]


EXTREMES = [0, 1, -1, 1023, 1024, -1024, 2**30, -(2**30), LARGEST, -LARGEST, 0x55555555, 12345678]


def test_divide_restores_extreme_states_at_every_gate():
    gate = torch.arange(1, 1024, dtype=torch.float64)
    for h in EXTREMES:
        assert_reversible(torch.full((1023,), float(h), dtype=torch.float64), [gate] * 5)


ADVERSARIES = {
    "always the largest": [1023] * 1000,
    "always the smallest": [1] * 1000,
    "smallest and largest in turn": [1, 1023] * 500,
    "largest, then smallest": [1023] * 500 + [1] * 500,
    "powers of two": [2 ** (i % 10) for i in range(1000)],
    "just beside powers of two": [max(1, 2 ** (i % 11) - 1) for i in range(1000)],
    "every gate once": list(range(1, 1001)),
}


@pytest.mark.parametrize("name", ADVERSARIES)
def test_divide_restores_a_thousand_adversarial_steps(name):
    assert_reversible(numbers(EXTREMES), list(numbers(ADVERSARIES[name])))


def test_divide_restores_states_whose_low_bits_are_set_at_every_step():
    words, gate = WordStream(), numbers([513, 1023, 3, 2])
    buffer, h = new_buffer(4, words=words), numbers([LARGEST, -LARGEST, -1, 2**23 - 1])
    history = []
    for _ in range(200):
        before = h.clone()
        buffer.multiply_(h, gate)
        assert_in_range(buffer)
        update = 1023 - torch.remainder(h, 1024)
        h.add_(update)
        history.append((before, update))
    for before, update in reversed(history):
        h.sub_(update)
        buffer.divide_(h, gate)
        assert torch.equal(h, before)
    assert buffer.is_initial()
    assert len(words) == 0


@given(st.integers(1, 1000), st.integers(0, 2**31))
@examples(max_examples=15)
def test_divide_restores_sequences_of_any_length(steps, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (steps, 3, 5)
    sequence = torch.randint(1, 1024, shape, generator=generator).double()
    h = torch.randint(-LARGEST, LARGEST, shape[1:], generator=generator).double()
    assert_reversible(h, list(sequence))


@given(st.lists(st.tuples(states, gates), min_size=1, max_size=50))
@examples(max_examples=100)
def test_product_is_wrong_by_less_than_one_unit_in_the_last_place(pairs):
    before, z = zip(*pairs, strict=True)
    buffer = new_buffer(len(pairs), words=WordStream())
    h = numbers(before)
    for _ in range(3):
        exact = [int(value) * gate for value, gate in zip(h.tolist(), z, strict=True)]
        buffer.multiply_(h, numbers(z))
        assert all(
            abs(int(new) * 1024 - old) < 1024 for new, old in zip(h.tolist(), exact, strict=True)
        )


def test_buffers_that_share_a_word_stream_are_undone_in_reverse_order():
    words = WordStream()
    buffers = [new_buffer(4, 6, words=words) for _ in range(3)]
    h = [normal(4, 6, seed=i).mul(2**23).round().double() for i in range(3)]
    start = [state.clone() for state in h]
    sequence = torch.randint(1, 1024, (100, 3, 4, 6), generator=torch.Generator().manual_seed(1))
    for step in sequence.double():
        for i in range(3):
            buffers[i].multiply_(h[i], step[i].clone())
    assert len(words) > 0
    for step in reversed(sequence.double()):
        for i in reversed(range(3)):
            buffers[i].divide_(h[i], step[i].clone())
    assert all(torch.equal(found, given) for found, given in zip(h, start, strict=True))
    assert all(buffer.is_initial() for buffer in buffers)
    assert len(words) == 0


def test_rows_beyond_those_of_the_state_stay_untouched():
    words = WordStream()
    buffer = new_buffer(5, 3, words=words)
    h = normal(5, 3).mul(2**23).round().double()
    start = h.clone()
    generator = torch.Generator().manual_seed(2)
    sequence = [torch.randint(1, 600, (1 + i % 5, 3), generator=generator) for i in range(100)]
    for z in sequence:
        untouched = buffer.state[len(z) :].clone()
        buffer.multiply_(h[: len(z)], z.double())
        assert torch.equal(buffer.state[len(z) :], untouched)
    for z in reversed(sequence):
        untouched = buffer.state[len(z) :].clone()
        buffer.divide_(h[: len(z)], z.double())
        assert torch.equal(buffer.state[len(z) :], untouched)
    assert torch.equal(h, start)
    assert buffer.is_initial()
    assert len(words) == 0


@pytest.mark.parametrize("bits", [1, 2, 3, 5, None])
@pytest.mark.parametrize("steps", [70, 1000])
def test_buffer_stores_hardly_more_than_the_forgotten_information(bits, steps):
    floor, units = 0.0 if bits is None else 2.0**-bits, (20, 50)
    words = WordStream()
    buffer = new_buffer(*units, words=words)
    h = normal(*units).mul(2**23).round().double()
    information = 0.0
    for step in range(steps):
        gate = floor + (1 - floor) * torch.sigmoid(2 * normal(*units, seed=step).double())
        z = (gate * 1024).round().clamp(lowest_gate(bits), 1023)
        information += (10 - z.log2()).sum().item()
        buffer.multiply_(h, z)
        h += (normal(*units, seed=10_000 + step) * 2**20).round().double()
    assert stored_bits(len(words), 1000) <= 1.03 * information + 64 * 1000
    assert 16 * len(words) + 1000 * 31 >= information, "nothing lossless is smaller"
    assert words.pack().nbytes == 2 * len(words)


def test_states_do_not_depend_on_whether_words_are_kept():
    kept, dropped = new_buffer(7, words=WordStream()), new_buffer(7, words=None)
    h, other = numbers([2.0**23] * 7), numbers([2.0**23] * 7)
    for step in range(50):
        z = numbers([1 + (step * 37 + i * 91) % 1023 for i in range(7)])
        kept.multiply_(h, z)
        dropped.multiply_(other, z)
    assert torch.equal(h, other)
    assert torch.equal(kept.state, dropped.state)


def test_a_buffer_that_dropped_its_words_refuses_to_be_reversed():
    buffer = new_buffer(1, words=None)
    h = numbers([12345.0])
    buffer.multiply_(h, numbers([1.0]))
    buffer.multiply_(h, numbers([1.0]))  # 20 bits: more than the state holds
    with pytest.raises(IndexError, match="dropped its words"):
        buffer.divide_(h, numbers([1.0]))


def test_a_buffer_is_initial_only_while_it_holds_nothing():
    buffer = new_buffer(3, words=WordStream())
    assert buffer.is_initial()
    buffer.multiply_(numbers([5.0, 6, 7]), numbers([1, 512, 1023]))
    assert not buffer.is_initial()


@pytest.mark.parametrize("block_words", [1, 7, 2**15])
@given(st.lists(st.lists(st.integers(0, 2**16 - 1), max_size=6), max_size=20), st.data())
@examples(max_examples=100)
def test_word_stream_is_a_stack(block_words, batches, data):
    with patch.object(buffer_module, "_BLOCK_WORDS", block_words):
        stream, truth = WordStream(), []
        for batch in batches:
            stream.push(numbers(batch))
            truth += batch
            if data.draw(st.booleans()):
                count = data.draw(st.integers(0, len(truth)))
                assert stream.pop(count).tolist() == truth[len(truth) - count :]
                del truth[len(truth) - count :]
            assert len(stream) == len(truth)
        reopened = WordStream(stream.pack())
        assert reopened.pop(len(truth)).tolist() == truth
        assert len(reopened) == 0


def test_word_stream_packs_two_bytes_per_word():
    stream = WordStream()
    for count in (3, 0, 4):
        stream.push(torch.zeros(count, dtype=torch.float64))
    stream.pop(2)
    packed = stream.pack()
    assert packed.dtype == torch.int16
    assert packed.untyped_storage().nbytes() == 2 * len(stream) == 10


def test_word_stream_says_how_many_words_it_lacks():
    stream = WordStream()
    stream.push(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(IndexError, match="holds 3 words, 4 were asked for"):
        stream.pop(4)


def test_information_is_the_sum_of_the_logarithms_of_the_gates():
    counts = torch.zeros(1025, dtype=torch.int64)
    for gate, count in {1: 3, 2: 1, 512: 5, 1000: 7, 1023: 11}.items():
        counts[gate] = count
    truth = 3 * 10 + 9 + 5 + 7 * math.log2(1024 / 1000) + 11 * math.log2(1024 / 1023)
    assert information_bits(counts) == pytest.approx(truth, rel=1e-12)


def test_stored_bits_count_words_and_states():
    assert stored_bits(words=10, states=7) == 10 * 16 + 7 * 32


@pytest.mark.parametrize("bits", [0.001, 0.5, 1, 2, 2.5, 3, 5, 9.99, 10, 40])
def test_lowest_gate_is_the_smallest_that_keeps_the_limit(bits):
    z = lowest_gate(bits)
    allowed = [gate for gate in range(1, 1024) if math.log2(1024 / gate) <= bits]
    assert z == (min(allowed) if allowed else 1023)


def test_no_limit_allows_every_gate():
    assert lowest_gate(None) == 1
