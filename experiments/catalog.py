"""`codesign list`."""

from typing import Annotated

import tyro

from codesign.experiments.tables import print_json, print_table


def list_names(*, as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> int:
    """Lists mechanisms, presets, tasks and experiments.

    Example: `codesign list --json`

    Args:
      as_json: Print JSON only.
    """
    # Imported here: these take a second, and `--help` does not need them.
    from codesign.experiments.configs import EXPERIMENTS
    from codesign.experiments.tasks import TASKS
    from codesign.hw.spec import load_preset, preset_names
    from codesign.mechanisms import MECHANISMS

    presets = {name: load_preset(name).mechanism for name in preset_names()}
    mechanisms = [
        {
            "name": name,
            "summary": mechanism.summary,
            "presets": [preset for preset, own in presets.items() if own == name],
        }
        for name, mechanism in MECHANISMS.items()
    ]
    tasks, experiments = (
        {
            name: (function.__doc__ or "").strip().partition("\n")[0]
            for name, function in known.items()
        }
        for known in (TASKS, EXPERIMENTS)
    )
    if as_json:
        print_json(
            {
                "mechanisms": mechanisms,
                "presets": presets,
                "tasks": tasks,
                "experiments": experiments,
            }
        )
        return 0
    print_table(
        "mechanisms",
        ("name", "summary", "presets"),
        [
            (str(one["name"]), str(one["summary"]), ", ".join(one["presets"]) or "-")
            for one in mechanisms
        ],
        text_columns=3,
    )
    print_table("presets", ("name", "made for"), list(presets.items()), text_columns=2)
    print_table("tasks", ("name", "content"), list(tasks.items()), text_columns=2)
    print_table("experiments", ("name", "content"), list(experiments.items()), text_columns=2)
    return 0
