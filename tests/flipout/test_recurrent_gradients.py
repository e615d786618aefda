"""Gradients of FlipoutLSTM and FlipoutGRU, which are written by hand."""

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from lightning_revflip.flipout import DropConnect, MultiplicativeGaussian, add_kl_gradient, kl
from lightning_revflip.flipout.recurrent_cells import GRU, LSTM
from tests.helpers.flipout_recurrent import (
    CELLS,
    FEATURES,
    HIDDEN,
    UniformNoise,
    as_hx,
    as_parts,
    draws_of,
    explicit,
    make,
    normal,
    objective,
    reseed,
    states,
)

EXACT = {"rtol": 1e-9, "atol": 1e-10}
OPTIONS = {
    "plain": {},
    "layers and directions": {"num_layers": 2, "bidirectional": True},
    "without bias": {"bias": False},
    "recurrent weights": {"perturbed": ("weight_hh",)},
    "input weights": {"perturbed": ("weight_ih",)},
    "base perturbations": {"base_perturbations": 3, "bidirectional": True},
    "DropConnect": {"perturbation": DropConnect(), "perturbed": ("weight_hh",)},
    "MultiplicativeGaussian": {"perturbation": MultiplicativeGaussian(0.5)},
    "own perturbation": {"perturbation": UniformNoise(), "base_perturbations": 2},
    "shared": {"estimator": "shared"},
}
LENGTHS = {"padded": (4, 4, 4, 4, 4), "packed": (2, 6, 1, 4, 4)}


def gradients(loss, tensors):
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return dict(zip(tensors, found, strict=True))


def run(layer, sequences, hx):
    """Outputs of each sequence and last states, by one call."""
    output, last = layer(pack_sequence(sequences, enforce_sorted=False), as_hx(hx))
    return unpack_sequence(output), as_parts(last)


def arranged(cell, lengths, **options):
    """A layer, its input and all tensors to differentiate by."""
    layer = make(cell, **options)
    sequences = [
        normal(length, FEATURES, seed=number).requires_grad_()
        for number, length in enumerate(lengths)
    ]
    hx = states(layer, len(lengths))
    given = [*sequences, *hx]
    tensors = dict(layer.named_parameters()) | {str(n): tensor for n, tensor in enumerate(given)}
    return layer, sequences, hx, tensors


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_explicit_weights(cell, options, lengths):
    layer, sequences, hx, tensors = arranged(cell, lengths, **options)
    expected = gradients(objective(*explicit(layer, draws_of(layer), sequences, hx)), tensors)
    found = gradients(objective(*run(layer, sequences, hx)), tensors)
    assert all(gradient is not None for gradient in found.values())
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("cell", CELLS)
def test_the_last_states_alone_pass_gradients_on(cell):
    layer, sequences, hx, tensors = arranged(cell, LENGTHS["packed"], bidirectional=True)
    _, finals = explicit(layer, draws_of(layer), sequences, hx)
    expected = gradients(objective([], finals), tensors)
    found = gradients(objective([], run(layer, sequences, hx)[1]), tensors)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("base_perturbations", [1, 2])
@pytest.mark.parametrize("cell", CELLS)
def test_every_call_before_one_backward_keeps_its_own_noise(cell, base_perturbations):
    options = {"base_perturbations": base_perturbations}
    layer, sequences, hx, tensors = arranged(cell, LENGTHS["padded"], **options)
    draws = [draws_of(layer, call) for call in range(4)]
    expected = sum(objective(*explicit(layer, draw, sequences, hx)) for draw in draws)
    found = sum(objective(*run(layer, sequences, hx)) for _ in draws)
    torch.testing.assert_close(gradients(found, tensors), gradients(expected, tensors), **EXACT)


@pytest.mark.parametrize("cell", CELLS)
def test_rho_gradients_agree_with_finite_differences_after_several_calls(cell):
    layer, sequences, hx, _ = arranged(cell, LENGTHS["packed"], num_layers=2)

    def loss():
        reseed(layer, 1)
        return sum(objective(*run(layer, sequences, hx)) for _ in range(3))

    rho = {n: p for n, p in layer.named_parameters() if n.endswith("_rho")}
    found = gradients(loss(), rho)
    for name, parameter in rho.items():
        direction = normal(*parameter.shape, seed=7)
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                sides.append(loss())
                parameter.sub_(direction, alpha=step)
        difference = (sides[0] - sides[1]) / 2e-5
        torch.testing.assert_close((found[name] * direction).sum(), difference, rtol=1e-4, atol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_the_same_graph_gives_the_same_gradients_twice(cell):
    layer, sequences, hx, tensors = arranged(cell, LENGTHS["padded"])
    loss = objective(*run(layer, sequences, hx))
    found = [torch.autograd.grad(loss, list(tensors.values()), retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias", "rho", "_l0"])
@pytest.mark.parametrize("perturbation", [None, DropConnect()], ids=["Gaussian", "DropConnect"])
@pytest.mark.parametrize("cell", CELLS)
def test_frozen_parameters_change_no_other_gradient(cell, perturbation, frozen):
    layer, sequences, hx, tensors = arranged(cell, (3, 3), perturbation=perturbation)
    expected = gradients(objective(*explicit(layer, draws_of(layer), sequences, hx)), tensors)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(frozen not in name)
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    found = gradients(objective(*run(layer, sequences, hx)), tensors)
    torch.testing.assert_close(found, {name: expected[name] for name in tensors}, **EXACT)


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_of_the_size_of_a_weight_is_kept_for_the_backward_pass(cell):
    layer = make(cell)
    steps, batch = 6, 5
    x = normal(steps, batch, FEATURES).requires_grad_()
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    states_of_cell = len(states(layer, batch))
    # Input, gates, output, one more number for each unit, and the initial states.
    of_step = FEATURES + layer.cell.gates * HIDDEN + 2 * HIDDEN
    assert sum(kept) == steps * batch * of_step + states_of_cell * batch * HIDDEN


@pytest.mark.parametrize("cell", [LSTM(), GRU()], ids=["LSTM", "GRU"])
def test_compiled_steps_agree_with_the_torch_path(cell):
    rows, size = 5, 37  # no multiple of a vector
    dtype, exact = torch.float32, torch.float64  # which the compiled functions leave to torch

    def numbers(width, seed, scale=3.0):
        return scale * normal(rows, width, seed=seed, dtype=dtype)

    a, u = numbers(cell.gates * size, 1), numbers(cell.gates * size, 2)
    a[0, :4] = torch.tensor([-200.0, 200.0, 0.0, 1e-6])
    before = [numbers(size, 3 + number, 1.0) for number in range(cell.states)]
    grads = [numbers(size, 8 + number) for number in range(cell.states)]
    results = []
    for kind in (dtype, exact):
        gates, state = a.to(kind, copy=True), [part.to(kind, copy=True) for part in before]
        kept, grad_a = gates.new_empty(rows, size), torch.empty_like(gates)
        grad = [part.to(kind, copy=True) for part in grads]
        cell.advance(gates, u.to(kind), kept, state)
        cell.retreat(gates, kept, before[0].to(kind), grad, grad_a)
        grad_u = cell.grad_u(grad_a, gates)
        results.append([part.double() for part in (gates, kept, *state, *grad, grad_a, grad_u)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_the_divergence_counts_every_perturbed_weight_once(cell):
    layer = make(cell, num_layers=2, bidirectional=True, perturbed=("weight_hh",))
    expected = 0.0
    for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
        mean, rho = (getattr(layer, f"weight_hh_{suffix}{end}") for end in ("", "_rho"))
        weights = torch.distributions.Normal(mean, torch.nn.functional.softplus(rho))
        prior = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
        expected += torch.distributions.kl_divergence(weights, prior).sum()
    torch.testing.assert_close(kl(layer), expected)
    layer(normal(7, 2, FEATURES))  # how many steps there are does not matter
    torch.testing.assert_close(add_kl_gradient(layer, 1.0), expected.detach())
