"""Points of a machine before anything is trained on it, as workloads in closed form."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from codesign.hw.closed_form import ModelShape, Setting, workload_from_fractions
from codesign.hw.closed_form_filters import (
    cascade_workload,
    masked_workload,
    packed_workload,
    scored_workload,
    searched_workload,
    serial_workload,
)
from codesign.hw.closed_form_on_demand import (
    eager_workload,
    on_demand_workload,
    similar_rows_workload,
)
from codesign.hw.quantities import Quantity
from codesign.hw.spec import AcceleratorSpec
from codesign.policy import bits_range
from codesign.workload import Workload


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """A named workload."""

    name: str
    workload: Workload


def published_setting(spec: AcceleratorSpec) -> Setting:
    """Returns kept fractions, bits and densities of the machine's published operating point."""
    point, default = spec.operating_point, Setting()

    def given(quantity: Quantity | None, otherwise: float) -> float:
        return otherwise if quantity is None else quantity.value

    return Setting(
        kept=tuple(fraction.value for fraction in point.kept),
        union=None if point.union is None else point.union.value,
        query_bits=given(point.query_bits, default.query_bits),
        key_bits=tuple(bits.value for bits in point.key_bits),
        qk_bits=point.qk_bits.value,
        v_bits=point.v_bits.value,
        weight_bits=given(point.linear_bits, default.weight_bits),
        activation_bits=given(point.linear_bits, default.activation_bits),
        output_bits=None if point.generation_bits is None else point.generation_bits.value,
        tile_bits=given(point.tile_bits, default.tile_bits),
        search_bits=given(point.search_bits, default.search_bits),
        generation_bits=None if point.generation_bits is None else point.generation_bits.value,
        activation_density=given(point.activation_density, 1.0),
        weight_density=given(point.weight_density, 1.0),
    )


def cheapest_setting(shape: ModelShape, *, num_rounds: int, skips_zeros: bool = False) -> Setting:
    """Returns the cheapest legal setting: one key kept by all queries alike, narrowest operands, shortest search.

    On a machine that skips zeros, everything is zero. Layers are alike, so that it is a lower bound where a mechanism's are
    not: SpAtten's first layer keeps all tokens.
    """
    density = 0.0 if skips_zeros else 1.0
    one = 1.0 / shape.num_tokens
    return Setting(
        kept=(one,) * num_rounds,
        union=one,
        query_bits=2.0,
        key_bits=tuple(2.0 + index for index in range(num_rounds)),
        qk_bits=8.0,
        v_bits=8.0,
        search_bits=bits_range("search_bits")[0],
        weight_bits=2.0,
        activation_bits=2.0,
        activation_density=density,
        weight_density=density,
    )


def skips_zeros(spec: AcceleratorSpec) -> bool:
    """Whether some unit of the machine skips products with a zero operand."""
    return any(
        unit.skips_zeros is not None and unit.skips_zeros.value for unit in spec.units.values()
    )


CLOSED_FORMS: dict[str, Callable[[ModelShape, Setting], Workload]] = {
    "energon": workload_from_fractions,
    "topk": scored_workload,
    "bitserial": serial_workload,
    "sanger": packed_workload,
    "a3": searched_workload,
    "spatten": cascade_workload,
    "sofa": functools.partial(on_demand_workload, sorts=True),
    "lapa": functools.partial(on_demand_workload, sorts=False),
    "esact": similar_rows_workload,
    "fact": eager_workload,
}
"""Closed forms of machines by mechanism; others run exact attention on what is kept."""


def closed_form_workload(spec: AcceleratorSpec, shape: ModelShape, setting: Setting) -> Workload:
    """Returns one example's workload on a machine of this kind, heads summed or one by one."""
    return CLOSED_FORMS.get(spec.mechanism, masked_workload)(shape, setting)


def operating_points(spec: AcceleratorSpec, shape: ModelShape) -> list[OperatingPoint]:
    """Returns dense, the cheapest legal and the published operating point of a machine on a model."""
    published = published_setting(spec)
    settings = {
        "dense": Setting(),
        "cheapest legal": cheapest_setting(
            shape, num_rounds=len(published.kept), skips_zeros=skips_zeros(spec)
        ),
        "published": published,
    }
    return [
        OperatingPoint(name=name, workload=closed_form_workload(spec, shape, setting))
        for name, setting in settings.items()
    ]
