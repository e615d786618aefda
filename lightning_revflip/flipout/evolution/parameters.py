"""Which parameters of a model its members differ in."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn

from lightning_revflip.flipout.evolution.layers import (
    MemberConv,
    MemberEmbedding,
    MemberLayer,
    MemberLinear,
    Perturbed,
    Use,
)
from lightning_revflip.flipout.evolution.noise import PerturbedParameter
from lightning_revflip.flipout.evolution.recurrent import MemberGRU, MemberLSTM
from lightning_revflip.flipout.evolution.settings import check_targets

MEMBER_LAYERS: dict[type[nn.Module], type[MemberLayer]] = {
    nn.Linear: MemberLinear,
    nn.Conv1d: MemberConv,
    nn.Conv2d: MemberConv,
    nn.Conv3d: MemberConv,
    nn.Embedding: MemberEmbedding,
    nn.LSTM: MemberLSTM,
    nn.GRU: MemberGRU,
}
"""What computes for the members in place of each plain layer."""

Targets = Sequence[str | type[nn.Module]]


class PerturbedModule(NamedTuple):
    """A layer, its name in the model, and its perturbed parameters by their names in the layer."""

    path: str
    module: nn.Module
    parameters: Perturbed


def perturbed_modules(model: nn.Module, targets: Targets | None) -> list[PerturbedModule]:
    """The layers of a model that have perturbed parameters.

    Parameters that need no gradient stay as they are. One that several layers share is the same
    in all of them.

    Args:
        model: holds the layers.
        targets: glob patterns of module names, or module types; None: all modules.

    Raises:
        ValueError: if a parameter cannot be perturbed, naming it, if there is none that can, if a
            target fits nothing, or for targets that are not a list.
    """
    check_targets(targets)
    known: dict[nn.Parameter, PerturbedParameter] = {}
    found, unsupported = [], []
    for path, module in _chosen(model, targets):
        own = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        }
        if not own:
            continue
        try:
            uses = _uses(module)
            parameters = {
                name: _perturbed(known, f"{path}.{name}".lstrip("."), parameter, uses[name])
                for name, parameter in own.items()
            }
        except ValueError as error:
            unsupported.append(f"{path or 'the model itself'} ({error})")
        else:
            found.append(PerturbedModule(path or type(module).__name__, module, parameters))
    if unsupported:
        layers = ", ".join(kind.__name__ for kind in MEMBER_LAYERS)
        raise ValueError(
            f"members cannot differ in the parameters of {'; '.join(unsupported)}. Supported are "
            f"{layers}. Name the modules to perturb by `targets`, and the others stay as they are; "
            "or set requires_grad=False on these."
        )
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no parameter to perturb: none of the modules that targets "
            f"({targets}) choose has one that requires a gradient."
        )
    return found


def _chosen(model: nn.Module, targets: Targets | None) -> list[tuple[str, nn.Module]]:
    """Names and modules that the targets choose."""
    modules = list(model.named_modules())
    if targets is None:
        return modules
    chosen = {}
    for target in targets:
        fitting = {path: module for path, module in modules if _fits(target, path, module)}
        if not fitting:
            raise ValueError(
                f"the target {target!r} fits no module of {type(model).__name__}, which has "
                f"{', '.join(path for path, _ in modules if path)}."
            )
        chosen.update(fitting)
    return [(path, module) for path, module in modules if path in chosen]


def _fits(target: str | type[nn.Module], path: str, module: nn.Module) -> bool:
    return fnmatchcase(path, target) if isinstance(target, str) else isinstance(module, target)


def _uses(module: nn.Module) -> dict[str, Use]:
    """How a layer uses its parameters; a ValueError says why it is not supported."""
    layer = MEMBER_LAYERS.get(type(module))
    if layer is None:
        raise ValueError(type(module).__name__)
    uses = layer.uses(module)
    other = [name for name, _ in module.named_parameters(recurse=False) if name not in uses]
    if other or len(list(module.modules())) > 1:
        raise ValueError(
            "its weights are computed from others (by weight_norm, parametrizations or similar)"
        )
    return uses


def _perturbed(
    known: dict[nn.Parameter, PerturbedParameter], name: str, parameter: nn.Parameter, use: Use
) -> PerturbedParameter:
    """The perturbation of a parameter, which may be known from another layer."""
    if parameter in known:
        before = known[parameter]
        if (before.inputs, before.blocks) != (use.inputs, use.blocks):
            raise ValueError(
                f"{name} is also {before.name}, where it is used in another way; untie them"
            )
        if before.still_row != use.still_row and use.still_row is not None:
            raise ValueError(
                f"{name} is also {before.name}, which does not know padding_idx="
                f"{use.still_row}; untie them, or build the embedding before that layer"
            )
        return before
    known[parameter] = PerturbedParameter(name, len(known), parameter, *use)
    return known[parameter]
