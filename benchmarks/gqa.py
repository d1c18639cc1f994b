"""A multi-head model, converted to grouped-query and multi-query attention, before and after 5 % more training.

    python benchmarks/gqa.py --out runs-gqa

trains the demo with multi-head attention (`tiny_mha`, about a minute on two cores), pools its key/value heads in each
of the three ways, and continues each with `tiny_uptrain`, as it does the model that was not converted. Prints a table,
and writes benchmarks/results/gqa.json and docs/gqa.png, which `--draw` draws again from the results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import fiddle as fdl
from lightning.pytorch import Trainer
from measure import RESULTS, picture, save, save_picture, table

from fiddlehead.checkpoints.grouped_query import convert_gqa
from fiddlehead.launch import launch
from fiddlehead.recipes.tiny import tiny_mha, tiny_uptrain
from fiddlehead.training import LanguageModel

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "gqa.png"
METHODS = ("mean", "first", "random")


def val_loss(weights: Path) -> float:
    """Nats a token on the validation windows of the demo."""
    data = fdl.build(tiny_uptrain().data)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    model = LanguageModel(init_from=weights)
    model.take_shape()
    trainer.validate(model, datamodule=data, verbose=False)
    return float(trainer.callback_metrics["val_loss"])


def trained(recipe, name: str, out: Path) -> Path:
    recipe.log.name, recipe.log.dir = name, str(out)
    run = out / name
    if not (run / "status.json").exists() or '"SUCCEEDED"' not in (run / "status.json").read_text():
        launch(recipe)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs-gqa"))
    parser.add_argument("--draw", action="store_true", help="only draw the picture")
    arguments = parser.parse_args()
    if arguments.draw:
        draw(json.loads((RESULTS / "gqa.json").read_text()))
        return
    out = arguments.out
    original = trained(tiny_mha(), "mha", out)
    rows = {"4 groups, as it was": (val_loss(original), val_loss(more(original, "mha-more", out)))}
    for groups in (2, 1):
        for method in METHODS:
            converted = out / f"converted-{groups}-{method}"
            if not converted.exists():
                convert_gqa(original, converted, groups, method)
            after = more(converted, f"{groups}-{method}", out)
            rows[f"{groups} group{'s' * (groups > 1)}, {method}"] = (val_loss(converted), val_loss(after))
    shown = [[name, f"{before:.4f}", f"{later:.4f}"] for name, (before, later) in rows.items()]
    print(table(["validation loss, nats a token", "converted", "after 5 % more"], shown))
    figures = {name: {"converted": before, "uptrained": later} for name, (before, later) in rows.items()}
    save("gqa", figures, ["torch", "lightning"])
    draw(json.loads((RESULTS / "gqa.json").read_text()))


def more(weights: Path, name: str, out: Path) -> Path:
    """The run that goes on from `weights`."""
    recipe = tiny_uptrain()
    recipe.model.init_from = str(weights)
    return trained(recipe, name, out)


def draw(results: dict[str, Any]) -> None:
    """Draws the validation loss of each conversion, before and after more training."""
    from fiddlehead.runs.curves import PALETTE
    from fiddlehead.runs.picture import DIM

    figure, axes = picture(7, 3.6)
    (reference, *_), *_ = [tuple(row.values()) for row in results["figures"].values()]
    rows = {name: row for name, row in results["figures"].items() if not name.startswith("4")}
    for at, row in enumerate(rows.values()):
        axes.plot([at, at], list(row.values()), color=DIM, linewidth=1.5, zorder=1)
        axes.plot(at, row["converted"], "o", color=PALETTE[1], markersize=9)
        axes.plot(at, row["uptrained"], "o", color=PALETTE[0], markersize=9)
    axes.axhline(reference, color=DIM, linewidth=1, linestyle="dashed")
    beside = {"xytext": (-9, 0), "textcoords": "offset points", "va": "center", "ha": "right", "fontsize": 10}
    named = "2 groups, random"  # where there is room
    axes.annotate("converted", (list(rows).index(named), rows[named]["converted"]), **beside)
    axes.annotate("after 5 % more training", (list(rows).index(named), rows[named]["uptrained"]), **beside)
    above = {"xytext": (0, -6), "textcoords": "offset points", "va": "top", "ha": "right", "fontsize": 10}
    axes.annotate("multi-head, before the conversion", (len(rows) - 0.5, reference), **above)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.set_xticks(range(len(rows)), [name.replace(", ", "\n") for name in rows])
    axes.set_ylabel("validation loss (nats per token)")
    axes.margins(y=0.15)
    axes.grid(axis="x", visible=False)
    save_picture(figure, PICTURE, results["where"])


if __name__ == "__main__":
    main()
