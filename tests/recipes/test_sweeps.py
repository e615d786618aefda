"""The sweep of each recipe is one that W&B takes, and its runs train and log its metric."""

import math
import sys

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from tests.helpers.recipe_runs import RECIPES, config_args, csv_rows, fit, last_callback, tiny

SWEEPS = sorted(RECIPES.glob("*/sweep*.yaml"))
SHORT = {"learning rate and prior of SGLD": last_callback(burn_in=2, every_n_steps=2)}
"""Further arguments of a sweep, by its name."""
KEYS = {"program", "project", "name", "method", "metric", "parameters", "command", "run_cap"}
"""Of those that W&B documents, the ones in use."""
DISTRIBUTIONS = {"log_uniform_values", "uniform", "int_uniform"}


def read(path):
    return yaml.safe_load(path.read_text())


def one_value(parameter):
    """A value of a parameter of a sweep that is not its default."""
    if "values" in parameter:
        return parameter["values"][0]
    return math.sqrt(parameter["min"] * parameter["max"])


def sweep_id(path):
    return f"{path.parent.name}-{path.stem}"


def test_every_recipe_has_a_sweep():
    recipes = {path.parent.parent.name for path in RECIPES.glob("*/configs/base.yaml")}
    assert {path.parent.name for path in SWEEPS} == recipes


@pytest.mark.parametrize("path", SWEEPS, ids=sweep_id)
def test_sweep_has_what_wandb_asks_for(path):
    sweep = read(path)
    assert {"program", "method", "metric", "parameters", "command"} <= set(sweep) <= KEYS
    assert sweep["method"] in ("grid", "random", "bayes")
    assert sweep["metric"]["goal"] in ("minimize", "maximize")
    assert sweep["command"][:2] == ["revflip", "fit"]
    assert sweep["command"][-1] == "${args}"
    assert ("run_cap" in sweep) == (sweep["method"] != "grid")  # a grid ends by itself
    for parameter in sweep["parameters"].values():
        if sweep["method"] == "grid" or "values" in parameter:
            assert set(parameter) == {"values"}
            assert len(set(parameter["values"])) > 1
        else:
            assert set(parameter) == {"distribution", "min", "max"}
            assert parameter["distribution"] in DISTRIBUTIONS
            assert 0 < parameter["min"] < parameter["max"]


def found_in(config: dict, name: str):
    """A value in the configuration of a run, by the name of its argument."""
    value = config
    for key in name.split("."):
        value = value[-1] if isinstance(value, list) else value
        value = value.get("init_args", value)[key]
    return value


@pytest.mark.parametrize("path", SWEEPS, ids=sweep_id)
def test_run_of_a_sweep_trains_without_wandb_and_matplotlib_and_logs_its_metric(
    monkeypatch, cwd, path
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its import raises
    monkeypatch.setitem(sys.modules, "wandb", None)
    sweep, recipe = read(path), path.parent.name
    values = {name: one_value(each) for name, each in sweep["parameters"].items()}
    # As an agent does it.
    arguments = {name: {"value": value} for name, value in values.items()}
    flags = create_sweep_command_args({"args": arguments})["args"]
    command = [each.replace("=recipes/", f"={RECIPES}/") for each in sweep["command"][2:-1]]
    short = [*config_args(recipe, "csv"), *tiny(recipe, cwd), *SHORT.get(sweep["name"], [])]
    fit(*command, *short, *flags)

    (config,) = cwd.rglob("config.yaml")
    found = yaml.safe_load(config.read_text())
    assert {name: found_in(found, name) for name in values} == values
    logged = {name for row in csv_rows(cwd) for name in row}
    assert sweep["metric"]["name"] in logged
    assert list(cwd.rglob("*.png")) == []
