"""`codesign reproduce`: published studies, measured here beside their published points."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from codesign.errors import RunDirectoryError
from codesign.experiments.configs import Experiment, sst2
from codesign.experiments.finished import DENSE_FOLDER
from codesign.experiments.run import write_json
from codesign.experiments.tables import print_json, print_table

Study = Literal["acceltran-sst2"]


def acceltran_sst2() -> Experiment:
    """MiniLM on SST-2 with DynaTran on the Edge machine."""
    return dataclasses.replace(sst2(), mechanism="acceltran", preset="acceltran-edge")


def reproduce(
    study: tyro.conf.Positional[Study],
    *,
    out: Path,
    data: Path | None = None,
    seed: int = 0,
    cache: Path | None = None,
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Measures a published study and prints its points beside the published ones.

    `acceltran-sst2`: accuracy and activation sparsity of MiniLM on SST-2 over AccelTran's threshold and top-k, sparsity
    with and without padding (arXiv 2302.14705). Writes OUT/study.json and OUT/study.png.

    Example: `codesign reproduce acceltran-sst2 --out runs/acceltran-sst2`

    Args:
      study: Its name.
      out: Directory to make.
      data: Folder of the data; default: $CODESIGN_DATA/sst2, else the Hugging Face hub.
      seed: Seed of the fine-tuning of the dense model.
      cache: Folder of the dense models; default: `dense` in `--out`.
      as_json: Print JSON only.
    """
    from codesign.experiments.acceltran_sst2 import draw_study, study as run_study
    from codesign.experiments.problem import load_problem

    del study  # one so far; the parser refuses others
    if (out / "study.json").exists():
        raise RunDirectoryError(f"'{out}' holds a study already: choose another directory")
    named = acceltran_sst2()
    experiment = dataclasses.replace(
        named, seed=seed, data=dataclasses.replace(named.data, data=data)
    )
    problem = load_problem(experiment, cache=cache or out / DENSE_FOLDER, progress=not as_json)
    rows = run_study(problem)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "study.json", rows)
    draw_study(rows, out / "study.png")
    if as_json:
        print_json(rows)
        return 0
    names = (
        *("accuracy", "published_accuracy"),
        *("sparsity", "sparsity_with_padding", "published_sparsity"),
    )
    print_table(
        f"SST-2, {len(problem.task.part('validation'))} sentences, percent",
        ("method", "setting", "accuracy", "published", "sparsity", "with padding", "published"),
        [
            (row["method"], f"{row['setting']:g}", *(f"{100.0 * row[name]:.2f}" for name in names))
            for row in rows
        ],
    )
    print(out / "study.json")
    print(out / "study.png")
    return 0
