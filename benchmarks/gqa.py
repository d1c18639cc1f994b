"""A multi-head model, converted to grouped-query and multi-query attention, before and after 5 % more training.

    python benchmarks/gqa.py --out runs-gqa

trains the demo with multi-head attention (`tiny_mha`, about a minute on two cores), pools its key/value heads in each
of the three ways, and continues each with `tiny_uptrain`, as it does the model that was not converted. Prints a table,
and writes benchmarks/results/gqa.json and docs/gqa.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import fiddle as fdl
from lightning.pytorch import Trainer
from measure import save, table

from fiddlehead.checkpoints.grouped_query import convert_gqa
from fiddlehead.launch import launch
from fiddlehead.recipes.tiny import tiny_mha, tiny_uptrain
from fiddlehead.training import LanguageModel

HERE = Path(__file__).parent
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
    out = parser.parse_args().out
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
    draw(rows)


def more(weights: Path, name: str, out: Path) -> Path:
    """The run that goes on from `weights`."""
    recipe = tiny_uptrain()
    recipe.model.init_from = str(weights)
    return trained(recipe, name, out)


def draw(rows: dict[str, tuple[float, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    (reference, continued), *_ = rows.values()
    names = [name for name in rows if not name.startswith("4")]
    for at, name in enumerate(names):
        before, later = rows[name]
        first = not at
        axes.plot([at, at], [before, later], color="#b7c4d1", linewidth=2, zorder=1)
        axes.scatter(at, before, color="white", edgecolor="#2f6690", s=60, label="converted" if first else None)
        axes.scatter(at, later, color="#2f6690", s=60, label="after 5 % more training" if first else None)
    axes.axhline(reference, color="black", linewidth=0.8, linestyle="--", label="multi-head, as it was")
    axes.axhline(continued, color="black", linewidth=0.8, linestyle=":", label="multi-head, after 5 % more")
    axes.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names])
    axes.set_ylabel("validation loss, nats a token")
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)
    axes.margins(y=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE.parent / "docs" / "gqa.png", dpi=130)


if __name__ == "__main__":
    main()
