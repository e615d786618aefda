"""Swap modules of an ordinary model for others: nn.GRU for RevGRU, wherever they are.

A module is replaced by a new one, or it is upgraded: it stays and takes on another class.
`convert` changes the model in place and returns what it did as a `ConversionSpec` of plain Python
values, which a checkpoint can hold; `apply_spec` repeats it on a fresh model, and
`load_from_checkpoint` does both for a Lightning checkpoint.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, runtime_checkable

from torch import nn

from lightning_revflip._conversion_places import (
    Place,
    bypassed_notice,
    check_anything_to_do,
    check_not_parametrized,
    check_replaceable,
    choose,
    find_places,
)
from lightning_revflip._conversion_values import (
    check_replacement,
    importable,
    imported,
    plain,
    rebuilt,
)


@runtime_checkable
class Upgrade(Protocol):
    """A class that a module takes on in place, keeping its identity, parameters and hooks.

    These are class methods: `FlipoutLinear.upgrade(linear)` turns an nn.Linear into one.
    """

    def check_upgrade(self, module: nn.Module, **kwargs: Any) -> None:
        """Raise ValueError if `module` cannot be upgraded; change nothing."""

    def upgrade(self, module: nn.Module, *, shared: dict[nn.Parameter, Any], **kwargs: Any) -> None:
        """Give `module` the new class and its further parameters.

        Args:
            module: one that `check_upgrade` accepted with the same arguments.
            shared: what has been added to parameters of this model, by parameter. A parameter that
                is in it is tied to another module and shares what that has; what is new goes in.
            kwargs: as for `check_upgrade`.
        """

    def shared_parameters(self, module: nn.Module) -> Mapping[nn.Parameter, Any]:
        """What an earlier upgrade added to the parameters of `module`, as `upgrade` notes it."""


Replacement = Callable[..., nn.Module] | Upgrade
"""What a rule turns a module into: a class with `from_standard(module, **kwargs)` or a function
`(module, **kwargs)`, which builds another module for its place, or an `Upgrade`.

It may have two more attributes: `unsupported`, types of modules that `convert` refuses by name, and
`bypassed`, types of modules that compute with the parameters of their children without calling
them, so that `convert` leaves these children alone."""

SPEC_KEY = "conversion"
"""Key of a serialised spec in a callback's state."""

_RECORD = "_lightning_revflip_conversions"
"""Attribute of a model in which its conversions are recorded."""

_loading = threading.Lock()
"""Held while `load_from_checkpoint` has a class changed."""

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Conversion:
    """One module that was replaced or upgraded."""

    paths: list[str]
    """All names under which the model holds it; more than one if it is shared."""
    source: str
    """Importable name of the class that it had, `module:qualified name`."""
    replacement: str
    """Importable name of what replaced it, or of its new class."""
    kwargs: dict[str, Any]
    """Arguments beyond those that the module determines, as plain Python values. An object is a
    dict of its `class_path` and `init_args`."""


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
        """The spec that `to_dict` described.

        Args:
            state: what `to_dict` returned, for example from a file.
        """
        return cls([Conversion(**conversion) for conversion in state["conversions"]])


def convert(
    module: nn.Module,
    rules: Mapping[type[nn.Module], Replacement],
    targets: Sequence[str | type[nn.Module]] | None = None,
    *,
    strict: bool = True,
    **kwargs: Any,
) -> ConversionSpec:
    """Replace or upgrade modules in place; device, dtype, train flag, `requires_grad` are kept.

    Replacements start from their own initialisation. Upgraded modules keep their identity, their
    parameters and their hooks; modules with tied parameters stay tied in all of them. A module that
    is used under several names is converted once and stays shared. Optimizers made before hold the
    parameters of before: convert first.

    Args:
        module: an ordinary model. It may itself be of a type in `rules` if that is upgraded; a
            module cannot replace itself in place.
        rules: replacement by exact type. Modules that were converted before are left alone.
        targets: glob patterns of module paths (`"encoder.*"`) or types that choose among the
            modules that the rules cover; None: all.
        strict: raise if a target, or without targets the whole model, has nothing to convert.
        kwargs: passed to every replacement. Plain Python values, or objects with
            `to_config() -> {"class_path": "module:QualName", "init_args": {...}}`, from which
            `apply_spec` builds them again; that dict can be passed in the object's stead.

    Returns:
        What this call did; no conversions if everything had been converted before.

    Raises:
        ValueError: naming the path of a module that cannot be converted, a target that matches
            nothing that the rules cover, the types there are if nothing is covered, or an argument
            that cannot be recorded. The model is unchanged then.

    Warns:
        UserWarning: naming the modules that are left alone because a parent of theirs does not call
            them, like the `out_proj` of an nn.MultiheadAttention.

    Examples:
        >>> from lightning_revflip.reversible import RevGRU
        >>> model = nn.Sequential(nn.Embedding(10, 8), nn.GRU(8, 16))
        >>> convert(model, {nn.GRU: RevGRU}, max_forget_bits=2.0).conversions[0].paths
        ['1']
        >>> model[1]
        RevGRU(8, 16, max_forget_bits=2.0)
    """
    if isinstance(targets, str):
        raise ValueError(f"targets must be a list of patterns or types, got {targets!r}.")
    arguments = {name: rebuilt(value) for name, value in kwargs.items()}
    recorded = {name: plain(value, name) for name, value in arguments.items()}
    places = find_places(module)
    chosen, bypassed = choose(places, rules, targets)
    if strict:
        check_anything_to_do(module, places, rules, targets)
    shared = _shared_parameters(module)
    changes: list[Callable[[], None]] = []
    conversions = []
    for place, rule in chosen:
        check_not_parametrized(place)
        if not isinstance(rule, Upgrade):
            check_replaceable(place, places)
        changes.append(_prepared(module, place, rule, arguments, shared))
        source, replacement = importable(type(place.module)), importable(rule)
        conversions.append(Conversion(place.paths, source, replacement, dict(recorded)))
    for change in changes:
        change()
    spec = ConversionSpec(conversions)
    _record(module, spec)
    if bypassed:
        warnings.warn(bypassed_notice(bypassed, rules), stacklevel=2)
    return spec


def apply_spec(module: nn.Module, spec: ConversionSpec) -> None:
    """Repeat on a fresh model what `convert` did to another one of the same structure.

    What was done to this model before, with the same arguments, is not done again. Replacements are
    called by the names in the spec: one that is not your own must come from `spec_of_checkpoint`.

    Args:
        module: changed in place.
        spec: what `convert` returned.

    Raises:
        ValueError: if a path is missing, or holds a module of another type. What comes before it in
            the spec has been done and is recorded then.
    """
    shared = _shared_parameters(module)
    for conversion in spec.conversions:
        if conversion in recorded_spec(module).conversions:
            continue
        found = {path: place for place in find_places(module) for path in place.paths}
        for path in conversion.paths:
            kind = type(found[path].module) if path in found else None
            if kind is None or importable(kind) != conversion.source:
                raise ValueError(
                    f"the conversion expects a {conversion.source} at {path!r}, found "
                    f"{'nothing' if kind is None else kind.__name__}. "
                    "Build the model with the arguments that it had when it was converted."
                )
        place = replace(found[conversion.paths[0]], paths=conversion.paths)
        rule = imported(conversion.replacement)
        arguments = {name: rebuilt(value) for name, value in conversion.kwargs.items()}
        _prepared(module, place, rule, arguments, shared)()
        _record(module, ConversionSpec([conversion]))


def recorded_spec(module: nn.Module) -> ConversionSpec:
    """Everything that was converted in a model, by `convert`, `apply_spec` or a callback.

    Args:
        module: the model that was given to them, not a part of it.
    """
    return vars(module).get(_RECORD, ConversionSpec())  # type: ignore[no-any-return]


def spec_of_checkpoint(checkpoint: Mapping[str, Any]) -> ConversionSpec:
    """Everything that callbacks had converted when a Lightning checkpoint was written.

    With `apply_spec` it makes the model that the weights belong to, also where Lightning is not
    installed; `load_from_checkpoint` does both.

    Args:
        checkpoint: what `torch.load(path, weights_only=True)` returns.

    Raises:
        ValueError: if it names a replacement other than a class with `from_standard` or `upgrade`:
            what a file names is not called unless it is made for this.

    Examples:
        >>> checkpoint = torch.load("model.ckpt", weights_only=True)  # doctest: +SKIP
        >>> apply_spec(network, spec_of_checkpoint(checkpoint))  # doctest: +SKIP
        >>> network.load_state_dict(checkpoint["state_dict"])  # doctest: +SKIP
    """
    found: list[Conversion] = []
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, Mapping) and SPEC_KEY in state:
            # A callback records what others before it have converted as well.
            conversions = ConversionSpec.from_dict(state[SPEC_KEY]).conversions
            found += [each for each in conversions if each not in found]
    for conversion in found:
        check_replacement(conversion.replacement)
    return ConversionSpec(found)


def load_from_checkpoint(cls: type[M], path: str | Path | IO[bytes], **kwargs: Any) -> M:
    """`cls.load_from_checkpoint(path)` for a model that callbacks had converted when it was saved.

    The plain method fails on such a checkpoint, because it builds the model unconverted. Here the
    conversions that the callbacks recorded are repeated before the weights are loaded, also on
    layers that are made in `configure_model`.

    Args:
        cls: an ordinary LightningModule class.
        path: a checkpoint file; one without conversions loads as usual.
        kwargs: as for `LightningModule.load_from_checkpoint`; `weights_only` is True, if not given.

    Raises:
        ValueError: if the model does not have the structure that was converted, and as
            `spec_of_checkpoint`.
    """
    own = vars(cls).get("on_load_checkpoint")

    # Lightning calls this after `configure_model` and before it loads the weights.
    def convert_first(self: Any, checkpoint: dict[str, Any]) -> None:
        apply_spec(self, spec_of_checkpoint(checkpoint))
        original(self, checkpoint)

    # A subclass with this hook would be simpler, but Lightning blocks checkpoints of its CLI, which
    # name their class, for any other class.
    with _loading:
        loadable: Any = cls
        original = loadable.on_load_checkpoint
        loadable.on_load_checkpoint = convert_first
        try:
            return loadable.load_from_checkpoint(path, **{"weights_only": True, **kwargs})  # type: ignore[no-any-return]
        finally:
            if own is None:
                del loadable.on_load_checkpoint
            else:
                loadable.on_load_checkpoint = own


def _prepared(
    model: nn.Module,
    place: Place,
    rule: Replacement,
    arguments: Mapping[str, Any],
    shared: dict[nn.Parameter, Any],
) -> Callable[[], None]:
    """The change of one module; what can fail happens now, and the model changes in the call."""
    try:
        if isinstance(rule, Upgrade):
            rule.check_upgrade(place.module, **arguments)
            return functools.partial(rule.upgrade, place.module, shared=shared, **arguments)
        replacement = _build(place.module, rule, arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot convert {place.name}: {error}") from error
    return functools.partial(_put, model, place.paths, replacement)


def _build(old: nn.Module, rule: Replacement, arguments: Mapping[str, Any]) -> nn.Module:
    """A module that is to stand in the place of `old`."""
    build: Any = getattr(rule, "from_standard", rule)
    new: nn.Module = build(old, **arguments)
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


def _shared_parameters(model: nn.Module) -> dict[nn.Parameter, Any]:
    """What upgrades of this model added before, by the parameter that it was added to."""
    shared: dict[nn.Parameter, Any] = {}
    for module in model.modules():
        kind: Any = type(module)
        if isinstance(kind, Upgrade):
            shared.update(kind.shared_parameters(module))
    return shared


def _record(module: nn.Module, spec: ConversionSpec) -> None:
    vars(module)[_RECORD] = recorded_spec(module) + spec
