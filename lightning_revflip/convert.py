"""Swap modules of an ordinary model for others: nn.GRU for RevGRU, wherever they are.

`convert` changes the model in place and returns what it did as a `ConversionSpec` of plain Python
values, which a checkpoint can hold; `apply_spec` repeats it on a fresh model, and
`load_from_checkpoint` does both for a Lightning checkpoint.
"""

import importlib
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
        kwargs: passed to every replacement.

    Returns:
        What this call did; no conversions if everything had been replaced before.

    Raises:
        ValueError: naming the path of a module that cannot be replaced, a target that matches
            nothing, or the types there are if nothing is covered by the rules. The model is
            unchanged then.

    Example:
        >>> from lightning_revflip.reversible import RevGRU
        >>> model = nn.Sequential(nn.Embedding(10, 8), nn.GRU(8, 16))
        >>> convert(model, {nn.GRU: RevGRU}, max_forget_bits=2.0).conversions[0].paths
        ['1']
        >>> model[1]
        RevGRU(8, 16, max_forget_bits=2.0)
    """
    places = _places(module)
    chosen = [place for place in places if _is_target(place, targets)]
    _check_targets(places, targets)
    built: list[tuple[_Place, nn.Module, Conversion]] = []
    for place in chosen:
        rule = _rule(place, rules)
        if rule is None:
            if targets is not None and not _is_replacement(place.module, rules):
                covered = ", ".join(kind.__name__ for kind in rules)
                raise ValueError(
                    f"{place.name} is a {type(place.module).__name__}, which no rule covers "
                    f"(rules: {covered}). Leave it out of targets."
                )
            continue
        conversion = Conversion(
            place.paths, _importable(type(place.module)), _importable(rule), dict(kwargs)
        )
        built.append((place, _build(place, rule, kwargs), conversion))
    if not built and not any(_is_replacement(place.module, rules) for place in chosen):
        raise ValueError(
            f"{type(module).__name__} holds no {' or '.join(kind.__name__ for kind in rules)} to "
            f"convert. It holds: {', '.join(sorted({type(p.module).__name__ for p in places}))}."
        )
    for place, replacement, _ in built:
        _put(module, place.paths, replacement)
    spec = ConversionSpec([conversion for _, _, conversion in built])
    _record(module, spec)
    return spec


def apply_spec(module: nn.Module, spec: ConversionSpec) -> None:
    """Repeat on a fresh model what `convert` did to another one of the same structure.

    Raises:
        ValueError: if a path is missing, or holds a module of another type.
    """
    for conversion in spec.conversions:
        found = dict(module.named_modules(remove_duplicate=False))
        source = _import(conversion.source)
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
    _record(module, spec)


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

    class Converted(cls):  # type: ignore[valid-type, misc]
        # Lightning calls this after `configure_model` and before it loads the weights.
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            for state in checkpoint.get("callbacks", {}).values():
                if isinstance(state, Mapping) and SPEC_KEY in state:
                    apply_spec(self, ConversionSpec.from_dict(state[SPEC_KEY]))
            cls.on_load_checkpoint(self, checkpoint)  # type: ignore[attr-defined]

    Converted.__name__ = cls.__name__
    Converted.__qualname__ = cls.__qualname__
    model = Converted.load_from_checkpoint(path, **kwargs)
    model.__class__ = cls
    return model  # type: ignore[no-any-return]


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


def _check_targets(places: list[_Place], targets: Sequence[str | type[nn.Module]] | None) -> None:
    if isinstance(targets, str):
        raise ValueError(f"targets must be a list of patterns or types, got {targets!r}.")
    for target in targets or []:
        if not any(_matches(place, target) for place in places):
            paths = ", ".join(path for place in places for path in place.paths if path)
            raise ValueError(f"target {target!r} matches no module. There are: {paths}.")


def _rule(place: _Place, rules: Mapping[type[nn.Module], Replacement]) -> Replacement | None:
    """The rule for a module; raises if a rule should cover it but cannot."""
    module = place.module
    rule = rules.get(parametrize.type_before_parametrizations(module))
    if rule is not None:
        _check_replaceable(place)
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


def _check_replaceable(place: _Place) -> None:
    module = place.module
    if place.paths[0] == "":
        raise ValueError(
            f"the model itself is a {type(module).__name__}, and a module cannot replace itself in "
            "place. Wrap it, for example in nn.Sequential or a LightningModule, or build the "
            "replacement directly."
        )
    if parametrize.is_parametrized(module):
        raise ValueError(f"{place.name} is parametrized. Convert it first, then parametrize it.")
    hooks = [name for name, value in vars(module).items() if name.endswith("hooks") and value]
    if hooks:
        raise ValueError(
            f"{place.name} has hooks ({', '.join(hooks)}), which its replacement would lose. "
            "Register them after the conversion."
        )


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
