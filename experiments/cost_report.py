"""`codesign cost`: what a machine takes at its operating points, before anything is trained on it."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

from codesign.errors import CodesignError
from codesign.experiments.acceltran_cost import print_simulated, simulated_record
from codesign.experiments.configs import Experiment, experiment_by_name
from codesign.experiments.model_choice import choose_model, model_shape
from codesign.experiments.tables import print_json, print_table
from codesign.experiments.tasks import load_task
from codesign.hw.accelerator import accelerator_from_spec
from codesign.hw.capacity import check_capacities
from codesign.hw.closed_form import ModelShape
from codesign.hw.operating_points import operating_points
from codesign.hw.sizing import size_ranges
from codesign.hw.spec import AcceleratorSpec, load_preset
from codesign.hw.surrogate import SCOPES, Cost, Scope, cost
from codesign.structure import TokenInput
from codesign.units import PJ_PER_UJ, US_PER_S

DEFAULT_SHAPE = ModelShape(
    num_tokens=64, num_layers=3, num_heads=2, head_dim=32, width=64, hidden=128
)
"""Sizes of the model that is priced unless others are given: that of the digits experiment."""


def cost_report(
    preset: tyro.conf.Positional[Path],
    *,
    tokens: int | None = None,
    layers: int | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
    width: int | None = None,
    hidden: int | None = None,
    experiment: str | None = None,
    simulator: Literal["acceltran"] | None = None,
    batch: int | None = None,
    activation_sparsity: float | None = None,
    weight_sparsity: float | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Prints latency, energy and area of a machine at its dense, cheapest legal and published operating points.

    Costs are per example. The attention engine runs in series with the host, which takes the linear layers. With
    `--simulator acceltran`: what a batch takes in AccelTran's own cycle-level simulator, its slips included
    (docs/validation.md), instead.

    Examples: `codesign cost energon --tokens 128 --layers 12 --heads 12 --head-dim 64 --width 768 --hidden 3072`;
    `codesign cost my_machine.toml --experiment digits`; BERT-Tiny: `codesign cost acceltran-edge --simulator acceltran
    --tokens 128 --layers 2 --heads 2 --head-dim 64 --width 128 --hidden 512`

    Args:
      preset: Name of a shipped preset, or path of a TOML file.
      tokens: Tokens of an example, >= 2; default 64, or the experiment's longest text.
      layers: Transformer blocks, >= 1; default 3.
      heads: Attention heads of a block, >= 1; default 2.
      head_dim: Width of a head, elements, >= 1; default 32.
      width: Width of the residual stream, elements, >= 1; default 64.
      hidden: Inner width of the feed-forward network, elements, >= 1; default 128.
      experiment: Take the model's sizes, embedding and head included, from this named experiment.
      simulator: Another tool's simulator in place of the cost model; it takes presets acceltran-*.
      batch: Examples that the simulator runs at once, >= 1; default: the preset's.
      activation_sparsity: Zeros among activations in the simulator, in [0, 1); default 0.5.
      weight_sparsity: Zeros among weights in the simulator, in [0, 1); default 0.5.
      as_json: Print JSON only.

    Raises:
      CodesignError: If the preset or a size is wrong.
    """
    spec = load_preset(preset)
    sizes = {
        "num_tokens": tokens,
        "num_layers": layers,
        "num_heads": heads,
        "head_dim": head_dim,
        "width": width,
        "hidden": hidden,
    }
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    for name, size in given.items():
        least = 2 if name == "num_tokens" else 1
        if size < least:
            raise CodesignError(f"`{_option(name)}` must be at least {least}, got {size}: raise it")
    if experiment is None:
        shape = dataclasses.replace(DEFAULT_SHAPE, **given)
    else:
        shape = _experiment_shape(experiment_by_name(experiment), given)
    check_capacities(spec, head_dim=shape.head_dim, width=shape.width)
    size_ranges(spec)  # Faulty ranges are named, though nothing is trained.
    if simulator is None:
        for name, value in (
            ("batch", batch),
            ("activation_sparsity", activation_sparsity),
            ("weight_sparsity", weight_sparsity),
        ):
            if value is not None:
                raise CodesignError(
                    f"`{_option(name)}` goes with `--simulator acceltran` only: add it, or leave this out"
                )
        record = cost_record(spec, shape)
    else:
        record = {"model": _model_record(shape)} | simulated_record(
            spec,
            shape,
            batch=batch,
            activation_sparsity=activation_sparsity,
            weight_sparsity=weight_sparsity,
        )
    if as_json:
        print_json(record)
    elif simulator is None:
        _print_record(record)
    else:
        print_simulated(record)
    return 0


def _option(size: str) -> str:
    return f"--{size.removeprefix('num_').replace('_', '-')}"


def _experiment_shape(named: Experiment, given: dict[str, Any]) -> ModelShape:
    """Returns the sizes of an experiment's model, of texts at the number of tokens that is given."""
    structure = choose_model(load_task(named.task, named.data), named).config.structure
    is_text = isinstance(structure.input, TokenInput)
    for name in given:
        if name != "num_tokens" or not is_text:
            raise CodesignError(
                f"`{_option(name)}` does not go with the model of experiment `{named.task}`, which has its own: "
                "leave it out"
            )
    tokens = given.get("num_tokens", structure.max_tokens)
    if tokens > structure.max_tokens:
        raise CodesignError(
            f"`--tokens` must be at most the model's {structure.max_tokens} positions, got {tokens}: lower it"
        )
    return model_shape(structure, tokens)


def cost_record(spec: AcceleratorSpec, shape: ModelShape) -> dict[str, Any]:
    """Returns cost and breakdown at every operating point; energies in pJ, times in cycles and µs, areas in mm2."""
    with jax.enable_x64(True):
        accelerator = accelerator_from_spec(spec)
        prices = {
            point.name: cost(point.workload, accelerator) for point in operating_points(spec, shape)
        }
        points = {
            name: {scope: _scope_record(price, scope, spec.clock_hz) for scope in SCOPES}
            for name, price in prices.items()
        }
    return {
        "preset": spec.name,
        "clock_hz": spec.clock_hz,
        "model": _model_record(shape),
        "points": points,
    }


def _model_record(shape: ModelShape) -> dict[str, int]:
    return {
        "num_tokens": shape.num_tokens,
        "num_layers": shape.num_layers,
        "num_heads": shape.num_heads,
        "head_dim": shape.head_dim,
        "width": shape.width,
        "hidden": shape.hidden,
    }


def _scope_record(price: Cost, scope: Scope, clock_hz: float) -> dict[str, Any]:
    cycles = float(price.latency_cycles(scope)[0])
    # Units work at the same time; a host runs after the engine.
    busy = {name: float(value[0]) for name, value in price.busy_by_unit(scope).items()}
    return {
        "latency_cycles": cycles,
        "latency_us": cycles / clock_hz * US_PER_S,
        "energy_pj": float(price.energy_pj(scope)[0]),
        "area_mm2": float(price.area_mm2(scope)),
        "energy_pj_by_unit": {
            name: float(value[0]) for name, value in price.energy_by_unit(scope).items()
        },
        "busy_cycles_by_unit": busy,
        "area_mm2_by_unit": {
            name: float(value) for name, value in price.area_by_unit(scope).items()
        },
    }


def _print_record(record: dict[str, Any]) -> None:
    model, points = record["model"], record["points"]
    sizes = ", ".join(f"{key.removeprefix('num_')} {value}" for key, value in model.items())
    rows = []
    for scope in SCOPES:
        dense = points["dense"][scope]
        for name, scopes in points.items():
            one = scopes[scope]
            rows.append(
                (
                    f"{scope.replace('_', ' ')}, {name}",
                    f"{one['latency_cycles']:,.0f}",
                    f"{one['latency_us']:.3f}",
                    f"{one['latency_cycles'] / dense['latency_cycles']:.3f}",
                    f"{one['energy_pj'] / PJ_PER_UJ:.4f}",
                    f"{one['energy_pj'] / dense['energy_pj']:.3f}",
                    f"{one['area_mm2']:.3f}",
                )
            )
    print_table(
        f"{record['preset']} at {record['clock_hz'] / 1e6:g} MHz, per example: {sizes}",
        ("point", "latency, cycles", "µs", "of dense", "energy, µJ", "of dense", "area, mm2"),
        rows,
    )
    whole = {name: scopes["end_to_end"] for name, scopes in points.items()}
    area = whole["dense"]["area_mm2_by_unit"]
    _print_units("energy by unit, µJ", "energy_pj_by_unit", whole, PJ_PER_UJ, ".4f")
    _print_units(
        "busy time by unit, cycles (units overlap)", "busy_cycles_by_unit", whole, 1, ",.0f"
    )
    print_table(
        "area by unit, mm2", ("unit", "area"), [(unit, f"{area[unit]:.4f}") for unit in area]
    )


def _print_units(
    title: str, key: str, points: dict[str, dict[str, Any]], divisor: float, form: str
) -> None:
    """Prints one breakdown, operating points side by side."""
    rows = []
    for unit in dict.fromkeys(unit for one in points.values() for unit in one[key]):
        values = [one[key].get(unit) for one in points.values()]
        cells = ["-" if value is None else format(value / divisor, form) for value in values]
        rows.append((unit, *cells))
    print_table(title, ("unit", *points), rows)
