"""Which modules of a model a conversion concerns, and what stands against converting them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from lightning_revflip._conversion_values import importable

Rules = Mapping[type[nn.Module], Any]
Targets = Sequence[str | type[nn.Module]] | None


@dataclass(frozen=True)
class Place:
    """A module, all paths to it, and the modules that hold it under these paths."""

    paths: list[str]
    module: nn.Module
    parents: list[nn.Module]

    @property
    def name(self) -> str:
        """What an error calls the module."""
        return repr(self.paths[0]) if self.paths[0] else "the model itself"


def find_places(model: nn.Module) -> list[Place]:
    """Every module below and including `model`, once, in order of definition."""
    places: dict[int, Place] = {}
    found = dict(model.named_modules(remove_duplicate=False))
    for path, module in found.items():
        place = places.setdefault(id(module), Place([], module, []))
        place.paths.append(path)
        if path:
            place.parents.append(found[path.rpartition(".")[0]])
    return list(places.values())


def choose(
    places: Sequence[Place], rules: Rules, targets: Targets
) -> tuple[list[tuple[Place, Any]], list[Place]]:
    """The modules to convert, each with its rule, and those that a rule would convert for nothing.

    The latter are children of a type in the rule's attribute `bypassed`: a parent that uses their
    parameters without calling them.

    Raises:
        ValueError: if a rule should cover a module but cannot, or a target is the very path of a
            module that would be converted for nothing.
    """
    chosen, bypassed = [], []
    for place in places:
        if targets is not None and not any(_matches(place, target) for target in targets):
            continue
        if _bypassing_parent(place, rules) is not None:
            bypassed.append(place)
            if targets is not None and any(target in place.paths for target in targets):
                raise ValueError(f"{bypassed_notice([place], rules)} Take it out of targets.")
        elif (rule := _rule(place, rules)) is not None:
            chosen.append((place, rule))
    return chosen, bypassed


def bypassed_notice(places: Sequence[Place], rules: Rules) -> str:
    """Says which modules would be converted for nothing, and why."""
    parents = {type(_bypassing_parent(place, rules)).__name__ for place in places}
    paths = ", ".join(repr(path) for place in places for path in place.paths)
    return (
        f"{paths} cannot be converted: {' and '.join(sorted(parents))} computes with the "
        "parameters of its children without calling them. These and parameters of its own (such as "
        "in_proj_weight) stay as they are."
    )


def check_anything_to_do(
    model: nn.Module, places: Sequence[Place], rules: Rules, targets: Targets
) -> None:
    """Raise if a target, or without targets the model, holds nothing that can be converted."""
    kinds = " or ".join(kind.__name__ for kind in rules)
    concerned = [place for place in places if _is_concerned(place, rules)]
    concerned += [place for place in places if _is_converted(place.module, rules)]
    bypassed = [place for place in places if _bypassing_parent(place, rules) is not None]
    notice = f"{bypassed_notice(bypassed, rules)} " if bypassed else ""
    if targets is None and not concerned:
        raise ValueError(
            f"{type(model).__name__} holds no {kinds} to convert. {notice}It holds: "
            f"{', '.join(sorted({type(place.module).__name__ for place in places}))}."
        )
    for target in targets or []:
        if not any(_matches(place, target) for place in concerned):
            paths = ", ".join(path for place in concerned for path in place.paths) or "none"
            raise ValueError(
                f"target {target!r} matches no {kinds}. {notice}There are: {paths}. "
                'A pattern matches whole paths: "encoder.*" means all below encoder.'
            )


def check_not_parametrized(place: Place) -> None:
    """Raise if a parameter of this module is computed from others."""
    if parametrize.is_parametrized(place.module):
        raise ValueError(f"{place.name} is parametrized. Convert it first, then parametrize it.")


def check_replaceable(place: Place, places: Sequence[Place]) -> None:
    """Raise if putting another module in the place of this one would lose something."""
    module, kind = place.module, type(place.module).__name__
    if place.paths[0] == "":
        raise ValueError(
            f"the model itself is a {kind}, and a module cannot replace itself in place. Wrap it, "
            "for example in nn.Sequential or a LightningModule, or build the replacement directly."
        )
    owners = [module, *module.parameters()]
    hooks = {
        name
        for owner in owners
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", *_OTHER_HOOKS)
        if getattr(owner, name, None)
    }
    if hooks:
        raise ValueError(
            f"{place.name} has hooks ({', '.join(sorted(hooks))}), which its replacement would "
            "lose. Register them after the conversion."
        )
    own = {id(parameter) for parameter in module.parameters()}
    for other in places:
        direct = other.module.parameters(recurse=False)
        if other.module is not module and any(id(parameter) in own for parameter in direct):
            raise ValueError(
                f"{place.name} shares parameters with {other.name}, which its replacement would "
                "not. Untie them, or leave it out by naming the modules to convert in targets."
            )
    if own and not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(
            f"{place.name} is frozen (requires_grad=False): its replacement would stay at random "
            "weights. Leave it out by naming the modules to convert in targets."
        )


_OTHER_HOOKS = ("_backward_pre_hooks", "_post_accumulate_grad_hooks", "_state_dict_hooks")


def _matches(place: Place, target: str | type[nn.Module]) -> bool:
    if isinstance(target, str):
        return any(fnmatchcase(path, target) for path in place.paths)
    return isinstance(place.module, target)


def _rule(place: Place, rules: Rules) -> Any:
    """The rule for a module, or None; raises if a rule should cover it but cannot."""
    module = place.module
    rule = rules.get(parametrize.type_before_parametrizations(module))
    if rule is not None:
        return rule
    if _is_converted(module, rules):
        return None
    for kind, replacement in rules.items():
        if isinstance(module, _types(kind, replacement)):
            raise ValueError(
                f"{place.name} is a {type(module).__name__}, which "
                f"{importable(replacement).split(':')[1]} cannot replace: only {kind.__name__} "
                "itself is supported. Leave it out by naming the modules to convert in targets."
            )
    return None


def _bypassing_parent(place: Place, rules: Rules) -> nn.Module | None:
    """The parent that makes it useless to convert a module which the rules concern."""
    if _is_converted(place.module, rules):
        return None
    for kind, rule in rules.items():
        if isinstance(place.module, _types(kind, rule)):
            for parent in place.parents:
                if isinstance(parent, getattr(rule, "bypassed", ())):
                    return parent
    return None


def _is_concerned(place: Place, rules: Rules) -> bool:
    types = tuple(each for kind, rule in rules.items() for each in _types(kind, rule))
    return isinstance(place.module, types) and _bypassing_parent(place, rules) is None


def _types(kind: type[nn.Module], rule: Any) -> tuple[type[nn.Module], ...]:
    """The type that a rule converts, and its relatives that the rule refuses."""
    return (kind, *getattr(rule, "unsupported", ()))


def _is_converted(module: nn.Module, rules: Rules) -> bool:
    return any(isinstance(rule, type) and isinstance(module, rule) for rule in rules.values())
