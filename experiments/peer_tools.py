"""Other tools run on the machines of `codesign.hw.tool_models`, where their packages are installed; no JAX.

Each function writes the tool's own files into a folder and returns cycles and energy of one product. Packages:
zigzag-dse 3.9.1 (with six), accelforge 1.0.467 (Python 3.12 or later), scalesim 3.0.0.
"""

import contextlib
import importlib
import io
import json
import logging
from pathlib import Path
from typing import Any

from codesign.errors import CodesignError
from codesign.hw.loop_nests import Operand
from codesign.hw.tool_models import ACCELFORGE, SPREAD, ZIGZAG
from codesign.hw.tool_switches import Dataflow, Memory, ToolModel
from codesign.units import HZ_PER_GHZ, PJ_PER_J

Sizes = tuple[int, int, int]
"""M, N and K of out[M, N] += in[M, K] w[K, N]."""
ZIGZAG_DIMS = ("B", "K", "C")
"""ZigZag's names of M, N and K."""
ZIGZAG_OPERANDS: dict[Operand, str] = {"input": "I1", "weight": "I2", "output": "O"}
ACCELFORGE_CLOCK_HZ = HZ_PER_GHZ


def tool_module(name: str) -> Any:
    """Returns a module of another tool, which need not be installed."""
    return importlib.import_module(name)


def _zigzag_memory(name: str, memory: Memory, operands: list[Operand]) -> dict[str, Any]:
    """Returns a memory as ZigZag describes it."""
    directions = [
        (operand, direction)
        for operand in operands
        for direction in (("fh", "tl", "fl", "th") if operand == "output" else ("fh", "tl"))
    ]
    ports: dict[str, list[str]] = {}
    for operand, direction in directions:
        is_read = direction.startswith("t")
        match memory.ports:
            case "one":
                port = "rw_port_1"
            case "transfer":
                port = f"{'r' if is_read else 'w'}_port_{1 + (direction in ('th', 'fl'))}"
            case _:
                port = f"{'r' if is_read else 'w'}_port_{1 + operands.index(operand)}"
        ports.setdefault(port, []).append(f"{ZIGZAG_OPERANDS[operand]}, {direction}")
    kinds = {"r": "read", "w": "write", "rw": "read_write"}
    return {
        "size": int(min(memory.capacity_bits, 1e12)),
        "r_cost": memory.read_pj * memory.port_bits,
        "w_cost": memory.write_pj * memory.port_bits,
        "area": 0.0,
        "latency": 1,
        "operands": [ZIGZAG_OPERANDS[operand] for operand in operands],
        "ports": [
            {
                "name": port,
                "type": kinds[port.partition("_")[0]],
                "bandwidth_min": int(memory.granule_bits),
                "bandwidth_max": int(memory.port_bits),
                "allocation": allocation,
            }
            for port, allocation in ports.items()
        ],
        "served_dimensions": [],
    }


def zigzag_files(model: ToolModel, sizes: Sizes, side: int, dataflow: Dataflow) -> dict[str, Any]:
    """Returns contents of ZigZag's files `workload`, `accelerator` and `mapping`."""
    paths = model.paths[dataflow]
    memories = {}
    for name in model.memories:
        operands: list[Operand] = [op for op in ("input", "weight", "output") if name in paths[op]]
        if operands:
            memories[name] = _zigzag_memory(name, model.memories[name], operands)
            if not model.memories[name].is_register:
                memories[name]["served_dimensions"] = ["D1", "D2"]
            elif dataflow == "weight_stationary" and operands == ["output"]:
                # A column adds up in one register.
                memories[name]["served_dimensions"] = ["D2"]
    bits = int(model.bits)
    precision = {"W": bits, "I": bits, "O": int(model.switches.partial_sum_bits), "O_final": bits}
    layer = {
        "id": 0,
        "name": "product",
        "operator_type": "Gemm",
        "equation": "O[b][k]+=I[b][c]*W[c][k]",
        "dimension_relations": [],
        "loop_dims": list(ZIGZAG_DIMS),
        "loop_sizes": list(sizes),
        "operand_precision": precision,
        "operand_source": {"W": 0, "I": 0},
    }
    first, second = (ZIGZAG_DIMS[dim] for dim in SPREAD[dataflow])
    spread = {"D1": [f"{first}, {side}"], "D2": [f"{second}, {side}"]}
    links = {"O": "O", "W": "I2", "I": "I1"}
    array = {
        "unit_energy": model.mac_pj,
        "unit_area": 1.0,
        "dimensions": ["D1", "D2"],
        "sizes": [side, side],
    }
    return {
        "workload": [layer],
        "accelerator": {
            "name": "array",
            "memories": memories,
            "operational_array": array,
        },
        "mapping": [{"name": "default", "spatial_mapping": spread, "memory_operand_links": links}],
    }


def zigzag_cost(
    sizes: Sizes, side: int, dataflow: Dataflow, folder: Path, *, num_factors: int = 6
) -> tuple[float, float]:
    """Returns ZigZag's cycles and energy, pJ, of the mapping of least energy.

    Args:
      sizes: The product.
      side: Places along each side of the array.
      dataflow: What stays in the array.
      folder: Where its files go.
      num_factors: Loops of an order (`lpf_limit`).
    """
    api = tool_module("zigzag.api")
    names = {}
    for name, content in zigzag_files(ZIGZAG, sizes, side, dataflow).items():
        names[name] = folder / f"{name}.yaml"
        names[name].write_text(json.dumps(content))  # JSON is YAML
    logging.disable(logging.CRITICAL)
    try:
        energy_pj, cycles, _ = api.get_hardware_performance_zigzag(
            *(str(names[name]) for name in ("workload", "accelerator", "mapping")),
            opt="energy",
            lpf_limit=num_factors,
            dump_folder=str(folder / "dump"),
            pickle_filename=str(folder / "dump" / "costs.pickle"),
            loma_show_progress_bar=False,
        )
    finally:
        logging.disable(logging.NOTSET)
    return float(cycles), float(energy_pj)


def accelforge_files(model: ToolModel, sizes: Sizes, side: int) -> dict[str, str]:
    """Returns contents of AccelForge's files `workload` and `arch`; energies in J, 1 GHz."""

    def memory(name: str, keep: str, extra: str = "") -> str:
        own = model.memories[name]
        rate = own.port_bits * ACCELFORGE_CLOCK_HZ
        actions = ", ".join(
            f"{{name: {action}, energy: {price / PJ_PER_J}, throughput: {rate}}}"
            for action, price in (("read", own.read_pj), ("write", own.write_pj))
        )
        return (
            f"  - !Memory {{name: {name}, size: {own.capacity_bits}, leak_power: 0, area: 0, {extra}"
            f"tensors: {{keep: {keep}}}, actions: [{actions}]}}\n"
        )

    def side_of(name: str, reused: str) -> str:
        return f"{{name: {name}, fanout: {side}, reuse: {reused}, may_reuse: {reused}}}"

    both = "total_latency: max(a.n_calls / a.throughput for a in actions), "
    compute = (
        f"{{name: compute, energy: {model.mac_pj / PJ_PER_J}, throughput: {ACCELFORGE_CLOCK_HZ}}}"
    )
    arch = (
        "arch:\n  nodes:\n"
        + memory("dram", "All")
        + memory("sram", "input | output", both)
        + f"  - !Container {{name: array, spatial: [{side_of('along_n', 'input')}, "
        + f"{side_of('along_k', 'output')}]}}\n"
        + memory("weight_register", "weight")
        + f"  - !Compute {{name: mac, leak_power: 0, area: 0, actions: [{compute}]}}\n"
    )
    bounds = "".join(
        f"    {name}: 0 <= {name} < {size}\n" for name, size in zip("mnk", sizes, strict=True)
    )
    workload = (
        f"workload:\n  iteration_space_shape:\n{bounds}"
        f"  bits_per_value: {{All: {int(model.bits)}}}\n"
        "  einsums:\n  - name: product\n    tensor_accesses:\n"
        "    - {name: I, projection: [m, k]}\n    - {name: W, projection: [k, n]}\n"
        "    - {name: O, projection: [m, n], output: True}\n"
        "    renames: {weight: W, input: I, output: O}\n"
    )
    return {"arch": arch, "workload": workload}


def accelforge_cost(sizes: Sizes, side: int, folder: Path) -> tuple[float, float]:
    """Returns AccelForge's cycles and energy, pJ, of the mapping of least energy times delay."""
    spec_module = tool_module("accelforge.frontend.spec")
    metrics = tool_module("accelforge.mapper").Metrics
    mapper = tool_module("accelforge.mapper.FFM.main")
    model = tool_module("accelforge.model.main")
    for name, content in accelforge_files(ACCELFORGE, sizes, side).items():
        (folder / f"{name}.yaml").write_text(content)
    spec = spec_module.Spec.from_yaml(*(folder / f"{name}.yaml" for name in ("arch", "workload")))
    spec.mapper.metrics = metrics.ENERGY_DELAY_PRODUCT
    found = mapper.map_workload_to_arch(spec, eval_in_detail=False, print_progress=False)
    spec.mapping = found.data.iloc[0]["Total<SEP>mapping"](_for_model=True)
    spec.model.metrics = metrics.ENERGY | metrics.LATENCY
    result = model.evaluate_mapping(
        spec, flattened_arches=found.flattened_arches, evaluated_specs=found.evaluated_specs
    )
    seconds, joules = (
        float(result.data.iloc[0][f"Total<SEP>{total}"]) for total in ("latency", "energy")
    )
    return seconds * ACCELFORGE_CLOCK_HZ, joules * PJ_PER_J


SCALE_SIM_DATAFLOWS = {
    "weight_stationary": "ws",
    "output_stationary": "os",
    "input_stationary": "is",
}


def scale_sim_cycles(sizes: Sizes, side: int, dataflow: Dataflow, folder: Path) -> float:
    """Returns SCALE-Sim's cycles, memories without stalls; minutes and gigabytes beyond 1e8 multiplications."""
    simulator = tool_module("scalesim.scale_sim").scalesim
    rows, cols, inner = sizes
    (folder / "topology.csv").write_text(f"Layer,M,N,K,\nproduct,{rows},{cols},{inner},\n")
    # The layout is read and, off as here, not used.
    (folder / "layout.csv").write_text(f"Layer\nproduct,{'1,' * 20}\n")
    layout = "".join(
        f"{operand}CustomLayout: False\n{operand}SRAMBankBandwidth: 10\n"
        f"{operand}SRAMBankNum: 10\n{operand}SRAMBankPort: 2\n"
        for operand in ("Ifmap", "Filter")
    )
    (folder / "scale.cfg").write_text(
        f"[general]\nrun_name = product\n[layout]\n{layout}[architecture_presets]\n"
        f"ArrayHeight: {side}\nArrayWidth: {side}\n"
        "IfmapSramSzkB: 1024\nFilterSramSzkB: 1024\nOfmapSramSzkB: 1024\n"
        "IfmapOffset: 0\nFilterOffset: 10000000\nOfmapOffset: 20000000\n"
        f"Bandwidth: 1000\nDataflow: {SCALE_SIM_DATAFLOWS[dataflow]}\n"
        "ReadRequestBuffer: 32\nWriteRequestBuffer: 32\n"
        "[sparsity]\nSparsitySupport: false\n[run_presets]\nInterfaceBandwidth: CALC\n"
        "UseRamulatorTrace: False\n"
    )
    with contextlib.redirect_stdout(io.StringIO()):
        run = simulator(
            save_disk_space=True,
            verbose=False,
            config=str(folder / "scale.cfg"),
            topology=str(folder / "topology.csv"),
            layout=str(folder / "layout.csv"),
            input_type_gemm=True,
        )
        run.run_scale(top_path=str(folder))
    reports = sorted(folder.glob("**/COMPUTE_REPORT.csv"))
    if not reports:
        raise CodesignError(f"'{folder}': SCALE-Sim left no report: use scalesim 3.0.0")
    heading, values = (line.split(",") for line in reports[0].read_text().splitlines()[:2])
    named = dict(zip((name.strip() for name in heading), values, strict=False))
    return float(named["Total Cycles"])
