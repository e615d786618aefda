"""Swap modules of an ordinary model for others: nn.GRU for RevGRU, wherever they are.

`convert` changes the model in place and returns what it did as a `ConversionSpec` of plain Python
values, which a checkpoint can hold; `apply_spec` repeats it on a fresh model, and
`load_from_checkpoint` does both for a Lightning checkpoint.
"""

import importlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, TypeVar

from torch import nn
from torch.nn.utils import parametrize

Replacement = Callable[..., nn.Module]
"""A class with `from_standard(module, **kwargs)`, or a function `(module, **kwargs)`, that builds
the replacement of `module`."""

SPEC_KEY = "conversion"
"""Key of a serialised spec in a callback's state."""


_RECORD = "_lightning_revflip_conversions"


@dataclass(frozen=True)
class Conversion:
    """One module that was replaced."""

    paths: list[str]
    """All names under which the model holds it; more than one if it is shared."""
    source: str
    """Importable name of the class that was replaced, `module:qualified name`."""
    replacement: str
    """Importable name of what replaced it."""
    kwargs: dict[str, Any]
    """Arguments beyond those that the replaced module determines."""


@dataclass(frozen=True)
class ConversionSpec:
    """What `convert` did, in an order in which `apply_spec` can repeat it."""

    conversions: list[Conversion] = field(default_factory=list)

    def __add__(self, other: "ConversionSpec") -> "ConversionSpec":
        return ConversionSpec(self.conversions + other.conversions)

    def to_dict(self) -> dict[str, Any]:
        """The spec as plain lists, dicts and strings."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> "ConversionSpec":
        """The spec that `to_dict` gave."""
        return cls([Conversion(**conversion) for conversion in state["conversions"]])


def convert(
    module: nn.Module,
    rules: Mapping[type[nn.Module], Replacement],
    targets: Sequence[str | type[nn.Module]] | None = None,
    *,
    strict: bool = True,
    **kwargs: Any,
) -> ConversionSpec:
    """Replace modules in place; device, dtype, train flag and `requires_grad` are kept.

    Replacements start from their own initialisation. A module that is used under several names is
    replaced once and stays shared. Optimizers made before hold the old parameters: convert first.

    Args:
        module: an ordinary model; it may not itself be of a type in `rules`, since a module cannot
            replace itself in place.
        rules: replacement by exact type. Modules that were replaced before are left alone.
        targets: glob patterns of module paths (`"encoder.*"`) or types that choose among the
            modules that the rules cover; None: all.
        strict: raise if a target, or without targets the whole model, has nothing to convert.
        kwargs: passed to every replacement.

    Returns:
        What this call did; no conversions if everything had been replaced before.

    Raises:
        ValueError: naming the path of a module that cannot be replaced, a target that matches
            nothing that the rules cover, or the types there are if nothing is covered. The model
            is unchanged then.

    Example:
        >>> from lightning_revflip.reversible import RevGRU
        >>> model = nn.Sequential(nn.Embedding(10, 8), nn.GRU(8, 16))
        >>> convert(model, {nn.GRU: RevGRU}, max_forget_bits=2.0).conversions[0].paths
        ['1']
        >>> model[1]
        RevGRU(8, 16, max_forget_bits=2.0)
    """
    if isinstance(targets, str):
        raise ValueError(f"targets must be a list of patterns or types, got {targets!r}.")
    places = _places(module)
    if strict:
        _check_anything_to_do(module, places, rules, targets)
    built: list[tuple[_Place, nn.Module, Conversion]] = []
    for place in places:
        rule = _rule(place, rules) if _is_target(place, targets) else None
        if rule is None:
            continue
        _check_replaceable(place, places)
        conversion = Conversion(
            place.paths, _importable(type(place.module)), _importable(rule), dict(kwargs)
        )
        built.append((place, _build(place, rule, kwargs), conversion))
    for place, replacement, _ in built:
        _put(module, place.paths, replacement)
    spec = ConversionSpec([conversion for _, _, conversion in built])
    _record(module, spec)
    return spec


def apply_spec(module: nn.Module, spec: ConversionSpec) -> None:
    """Repeat on a fresh model what `convert` did to another one of the same structure.

    What was done to this model before, with the same arguments, is not done again.

    Raises:
        ValueError: if a path is missing, or holds a module of another type.
    """
    done = []
    for conversion in spec.conversions:
        found = dict(module.named_modules(remove_duplicate=False))
        source = _import(conversion.source)
        if conversion in recorded_spec(module).conversions:
            continue
        for path in conversion.paths:
            if type(found.get(path)) is not source:
                raise ValueError(
                    f"the conversion expects a {conversion.source} at {path!r}, found "
                    f"{type(found[path]).__name__ if path in found else 'nothing'}. "
                    "Build the model with the arguments that it had when it was converted."
                )
        place = _Place(conversion.paths, found[conversion.paths[0]])
        replacement = _build(place, _import(conversion.replacement), conversion.kwargs)
        _put(module, conversion.paths, replacement)
        done.append(conversion)
    _record(module, ConversionSpec(done))


def recorded_spec(module: nn.Module) -> ConversionSpec:
    """Everything that was converted in a model, by `convert`, `apply_spec` or a callback."""
    return vars(module).get(_RECORD, ConversionSpec())  # type: ignore[no-any-return]


M = TypeVar("M", bound=nn.Module)


def load_from_checkpoint(cls: type[M], path: str | Path | IO[bytes], **kwargs: Any) -> M:
    """`cls.load_from_checkpoint(path)` for a model that callbacks had converted when it was saved.

    The plain method fails on such a checkpoint, because it builds the model unconverted. Here the
    conversions that the callbacks recorded are repeated before the weights are loaded, also on
    layers that are made in `configure_model`.

    Args:
        cls: an ordinary LightningModule class.
        path: a checkpoint file; one without conversions loads as usual.
        kwargs: as for `LightningModule.load_from_checkpoint`.

    Raises:
        ValueError: if the model does not have the structure that was converted.
    """
    own = vars(cls).get("on_load_checkpoint")

    # Lightning calls this after `configure_model` and before it loads the weights.
    def convert_first(self: Any, checkpoint: dict[str, Any]) -> None:
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, Mapping) and SPEC_KEY in state:
                apply_spec(self, ConversionSpec.from_dict(state[SPEC_KEY]))
        original(self, checkpoint)

    # A subclass with this hook would be simpler, but Lightning blocks checkpoints of its CLI, which
    # name their class, for any other class.
    with _loading:
        loadable: Any = cls
        original = loadable.on_load_checkpoint
        loadable.on_load_checkpoint = convert_first
        try:
            return loadable.load_from_checkpoint(path, **kwargs)  # type: ignore[no-any-return]
        finally:
            if own is None:
                del loadable.on_load_checkpoint
            else:
                loadable.on_load_checkpoint = own


_loading = threading.Lock()


@dataclass(frozen=True)
class _Place:
    """A module and all paths to it."""

    paths: list[str]
    module: nn.Module

    @property
    def name(self) -> str:
        return repr(self.paths[0]) if self.paths[0] else "the model itself"


def _places(module: nn.Module) -> list[_Place]:
    """Every module below and including `module`, once, in order of definition."""
    places: dict[int, _Place] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        places.setdefault(id(part), _Place([], part)).paths.append(path)
    return list(places.values())


def _is_target(place: _Place, targets: Sequence[str | type[nn.Module]] | None) -> bool:
    return targets is None or any(_matches(place, target) for target in targets)


def _matches(place: _Place, target: str | type[nn.Module]) -> bool:
    if isinstance(target, str):
        return any(fnmatchcase(path, target) for path in place.paths)
    return isinstance(place.module, target)


def _check_anything_to_do(
    module: nn.Module,
    places: list[_Place],
    rules: Mapping[type[nn.Module], Replacement],
    targets: Sequence[str | type[nn.Module]] | None,
) -> None:
    """Raise if a target, or without targets the model, holds nothing that the rules concern."""
    kinds = " or ".join(kind.__name__ for kind in rules)
    unsupported = [kind for rule in rules.values() for kind in getattr(rule, "unsupported", ())]
    concerned = [place for place in places if isinstance(place.module, (*rules, *unsupported))]
    concerned += [place for place in places if _is_replacement(place.module, rules)]
    if targets is None and not concerned:
        raise ValueError(
            f"{type(module).__name__} holds no {kinds} to convert. It holds: "
            f"{', '.join(sorted({type(place.module).__name__ for place in places}))}."
        )
    for target in targets or []:
        if not any(_matches(place, target) for place in concerned):
            paths = ", ".join(path for place in concerned for path in place.paths) or "none"
            raise ValueError(
                f"target {target!r} matches no {kinds}. There are: {paths}. "
                'A pattern matches whole paths: "encoder.*" means all below encoder.'
            )


def _rule(place: _Place, rules: Mapping[type[nn.Module], Replacement]) -> Replacement | None:
    """The rule for a module; raises if a rule should cover it but cannot."""
    module = place.module
    rule = rules.get(parametrize.type_before_parametrizations(module))
    if rule is not None:
        return rule
    if _is_replacement(module, rules):
        return None
    for kind, replacement in rules.items():
        unsupported = getattr(replacement, "unsupported", ())
        if isinstance(module, (kind, *unsupported)):
            raise ValueError(
                f"{place.name} is a {type(module).__name__}, which "
                f"{_importable(replacement).split(':')[1]} cannot replace: only {kind.__name__} "
                "itself is supported. Leave it out by naming the modules to convert in targets."
            )
    return None


def _is_replacement(module: nn.Module, rules: Mapping[type[nn.Module], Replacement]) -> bool:
    return any(isinstance(rule, type) and isinstance(module, rule) for rule in rules.values())


def _check_replaceable(place: _Place, places: list[_Place]) -> None:
    """Raise if replacing this module would lose something."""
    module, kind = place.module, type(place.module).__name__
    if place.paths[0] == "":
        raise ValueError(
            f"the model itself is a {kind}, and a module cannot replace itself in place. Wrap it, "
            "for example in nn.Sequential or a LightningModule, or build the replacement directly."
        )
    if parametrize.is_parametrized(module):
        raise ValueError(f"{place.name} is parametrized. Convert it first, then parametrize it.")
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


def _build(place: _Place, rule: Replacement, kwargs: Mapping[str, Any]) -> nn.Module:
    old = place.module
    build = getattr(rule, "from_standard", rule)
    try:
        new: nn.Module = build(old, **kwargs)
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot convert {place.name}: {error}") from error
    like = next((p for p in old.parameters() if p.is_floating_point()), None)
    if like is not None:
        new.to(device=like.device, dtype=like.dtype)
    trainable = {name: p.requires_grad for name, p in old.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(trainable.get(name, True))
    return new.train(old.training)


def _put(module: nn.Module, paths: list[str], replacement: nn.Module) -> None:
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, replacement)


def _record(module: nn.Module, spec: ConversionSpec) -> None:
    vars(module)[_RECORD] = recorded_spec(module) + spec


def _importable(target: Any) -> str:
    return f"{target.__module__}:{target.__qualname__}"


def _import(name: str) -> Any:
    module, _, qualname = name.partition(":")
    target: Any = importlib.import_module(module)
    try:
        for part in qualname.split("."):
            target = getattr(target, part)
    except AttributeError as error:
        raise ValueError(
            f"{name} cannot be imported; a conversion can only be repeated with replacements that "
            "are defined at the top of a module (not lambdas or local functions)."
        ) from error
    return target
