"""The arguments of a conversion as plain Python values, and back.

An object that describes itself, `to_config() -> {"class_path": "module:QualName", "init_args":
{...}}`, is recorded in that form and built again from it. So a record of a conversion can stand in
a checkpoint that is loaded with `weights_only=True`, or in a JSON file.
"""

import importlib
import re
import sys
from typing import Any

_CONFIG_KEYS = {"class_path", "init_args"}
_OURS = re.compile(r"lightning_revflip(?!\.(cli|_recipes)\b)(\.\w+)*")
"""Modules that may be imported because a name says so: to import them does nothing else."""


def plain(value: Any, name: str) -> Any:
    """A copy of an argument that consists of None, numbers, strings, lists, tuples and dicts.

    Args:
        value: an argument of a conversion.
        name: what an error calls it.

    Raises:
        ValueError: if it holds something else that has no `to_config`, or an object that cannot be
            built again from what that returns.
    """
    # Not isinstance: a checkpoint with a numpy.float64, which is a float, is not loaded either.
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return type(value)(plain(item, name) for item in value)
    if type(value) is dict:
        return {key: plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if not hasattr(value, "to_config") or isinstance(value, type):
        raise ValueError(
            f"{name} must consist of None, numbers, strings, lists, tuples, dicts and objects with "
            f"to_config(), or no checkpoint could hold the conversion; got {value!r} of type "
            f"{type(value).__name__}."
        )
    config = value.to_config()
    if not _is_config(config):
        raise ValueError(
            f"{type(value).__name__}.to_config() must return "
            f'{{"class_path": "module:QualName", "init_args": {{...}}}}, got {config!r}.'
        )
    recorded = plain(config, name)
    if _build(**recorded).to_config() != config:
        raise ValueError(
            f"{type(value).__name__}.to_config() must describe the object completely: what is "
            f"built from {config} describes itself in another way."
        )
    return recorded


def rebuilt(value: Any) -> Any:
    """An argument whose recorded objects are objects again; others are passed on as they are.

    Raises:
        ValueError: if a recorded class cannot be imported, has no `to_config`, or refuses its
            arguments.
    """
    if type(value) in (list, tuple):
        return type(value)(rebuilt(item) for item in value)
    if type(value) is not dict:
        return value
    items = {key: rebuilt(item) for key, item in value.items()}
    return _build(**items) if _is_config(items) else items


def importable(target: Any) -> str:
    """The name by which `imported` finds a class or function, `module:qualified name`."""
    return f"{target.__module__}:{target.__qualname__}"


def imported(name: str) -> Any:
    """The class or function of an importable name.

    The name may come from a file that somebody sent, and to import a module runs it: only modules
    of this package are imported, others must have been.

    Raises:
        ValueError: if there is none, or its module has not been imported.
    """
    module, _, qualname = name.partition(":")
    if module not in sys.modules and not _OURS.fullmatch(module):
        raise ValueError(
            f"a conversion names {name}, and {module} has not been imported. If you trust where "
            f"the name comes from, import {module} first."
        )
    try:
        target: Any = importlib.import_module(module)
        for part in qualname.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"{name} cannot be imported; a conversion can only be repeated with what is defined at "
            "the top of a module (not lambdas or local functions and classes)."
        ) from error
    return target


def check_replacement(name: str) -> None:
    """Raise unless an importable name that a file holds is that of a class made to replace layers.

    Other things that can be called with a module might do anything: `timeit.timeit` runs the code
    in its argument `setup`.

    Raises:
        ValueError: if it is something else, or nothing.
    """
    rule = imported(name)
    if not (
        isinstance(rule, type) and (hasattr(rule, "from_standard") or hasattr(rule, "upgrade"))
    ):
        raise ValueError(
            f"the checkpoint names {name} as a replacement, which is not a class with "
            "`from_standard` or `upgrade` and is not called. If it is a function of yours, call "
            "`convert` with it before you load the weights, or make it the static method "
            "`from_standard` of a class."
        )


def _is_config(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == _CONFIG_KEYS
        and isinstance(value["class_path"], str)
        and isinstance(value["init_args"], dict)
    )


def _build(class_path: str, init_args: dict[str, Any]) -> Any:
    cls = imported(class_path)
    # The name may come from a file that somebody sent: only what is meant for it is ever called.
    if not (isinstance(cls, type) and hasattr(cls, "to_config")):
        raise ValueError(f"{class_path} is not a class with to_config() and is not built.")
    try:
        return cls(**init_args)
    except (ValueError, TypeError) as error:
        raise ValueError(f"cannot build {class_path} from {init_args}: {error}") from error
