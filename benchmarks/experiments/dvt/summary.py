"""Results of the ablation -> a table beside the paper's, and a picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.experiments.dvt.run import ARMS, Result
from benchmarks.experiments.summary import Spread

PAPER = {"none": ("-", "73.5 %", "76.7 %"), "both": ("-", "75.7 %", "80.0 %")}
"""ImageNet accuracy at the three exits of DVT on T2T-ViT-12: arXiv:2105.15075, table 6."""


def by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Sort results by arm, in the arms' order; arms without any are left out."""
    found = {arm.name: [r for r in results if r.arm == arm.name] for arm in ARMS}
    return {name: runs for name, runs in found.items() if runs}


def format_table(results: Sequence[Result]) -> str:
    """Lay the results out as Markdown: accuracy, difference to no reuse, and cost of each exit."""
    arms = by_arm(results)
    exits = range(len(results[0].accuracy))
    plain = {run.seed: run for run in arms.get("none", [])}
    seeds = max(len(runs) for runs in arms.values())
    lines = [
        f"Accuracy at each exit, mean ± standard deviation over {seeds} seed(s); below it the "
        "difference to no reuse, paired by seed. MFLOPs are those of a mean image up to the exit.",
        "",
        "| reuse | " + " | ".join(f"exit {k + 1}" for k in exits) + " | MFLOPs | s/step | paper, "
        "table 6: exits 1 / 2 / 3 |",
        "| --- |" + " --- |" * (len(exits) + 3),
    ]
    for name, runs in arms.items():
        cells = []
        for k in exits:
            cell = Spread.of([run.accuracy[k] for run in runs]).text(".1%")
            pairs = [(run, plain[run.seed]) for run in runs if run.seed in plain]
            if name != "none" and pairs:
                gain = Spread.of([a.accuracy[k] - b.accuracy[k] for a, b in pairs])
                cell += f"<br>{gain.text('+.1%')}"
            cells.append(cell)
        flops = " / ".join(f"{value / 1e6:.1f}" for value in runs[0].flops)
        seconds = Spread.of([run.seconds_per_step for run in runs]).text(".2f")
        paper = " / ".join(PAPER.get(name, ("-", "-", "-")))
        lines.append(f"| {name} | {' | '.join(cells)} | {flops} | {seconds} | {paper} |")
    return "\n".join(lines)


def draw(results: Sequence[Result], path: Path) -> Path:
    """Draw accuracy over the operations up to each exit: means, and bars from lowest to highest."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for number, (name, runs) in enumerate(by_arm(results).items()):
        found = np.array([run.accuracy for run in runs])
        mean = found.mean(0)
        axes.errorbar(
            np.array(runs[0].flops) / 1e6,
            mean,
            yerr=[mean - found.min(0), found.max(0) - mean],
            color=f"C{number}",
            marker="o",
            markersize=4,
            capsize=2,
            label=f"reuse: {name}",
        )
    axes.set_xlabel("MFLOPs of an image up to the exit")
    axes.set_ylabel("accuracy on held-out images")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path
