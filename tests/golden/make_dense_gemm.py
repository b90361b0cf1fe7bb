"""Runs another tool on a few products and writes its rows of dense_gemm.json: `python make_dense_gemm.py zigzag`.

Needs the tool (versions in `codesign.experiments.peer_tools`) and this project; scalesim 3.0.0 also NumPy below 2.3.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from codesign.experiments import peer_tools
from codesign.hw.tool_models import TOOLS

GOLDEN = Path(__file__).resolve().parent / "dense_gemm.json"
PRODUCTS = [
    ((64, 64, 64), 32),
    ((1, 768, 768), 32),
    ((100, 31, 300), 8),
    ((197, 96, 64), 16),
    ((577, 20, 1), 16),
    ((77, 256, 197), 32),
    ((1536, 512, 77), 32),
    ((1024, 768, 768), 32),
    ((2048, 1000, 1536), 16),
]
"""Sizes M, N, K and the array's side: one tile of rows, sides that do not divide, products beyond the buffer."""
MAX_SIMULATED = 10**6
"""Multiplications up to which SCALE-Sim is run."""


def rows_of(tool: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for sizes, side in PRODUCTS:
        for dataflow in TOOLS[tool].dataflows:
            with TemporaryDirectory() as name:
                folder, energy_pj = Path(name), None
                if tool == "zigzag":
                    cycles, energy_pj = peer_tools.zigzag_cost(sizes, side, dataflow, folder)
                elif tool == "accelforge":
                    cycles, energy_pj = peer_tools.accelforge_cost(sizes, side, folder)
                elif sizes[0] * sizes[1] * sizes[2] <= MAX_SIMULATED:
                    cycles = peer_tools.scale_sim_cycles(sizes, side, dataflow, folder)
                else:
                    continue
            rows.append(
                {"tool": tool, "sizes": sizes, "side": side, "dataflow": dataflow}
                | {"cycles": cycles, "energy_pj": energy_pj}
            )
    return rows


if __name__ == "__main__":
    record = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"rows": []}
    tool = sys.argv[1]
    record["provenance"] = (
        "Made by make_dense_gemm.py with scalesim 3.0.0 (NumPy 2.2), zigzag-dse 3.9.1 and accelforge 1.0.467 "
        "(single precision) on the machines of codesign.hw.tool_models."
    )
    record["rows"] = [row for row in record["rows"] if row["tool"] != tool] + rows_of(tool)
    head, rows = {"provenance": record["provenance"]}, record["rows"]
    lines = ",\n".join(json.dumps(row) for row in rows)
    GOLDEN.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')
