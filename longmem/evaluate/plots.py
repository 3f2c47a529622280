"""Pictures of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .perplexity import PerplexityReport

if TYPE_CHECKING:
    from longmem.tasks.recall import RecallReport


def plot_perplexity(report: PerplexityReport, path: str | Path, title: str) -> None:
    """Held-out perplexity by kind of memory, with standard errors, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(report.nll)
    labels = [name.replace(", ", ",\n") for name in names]
    gains = [report.difference(name, "backbone") for name in names]
    scores = [report.estimate(name) for name in names]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    colours = ["#8a8a8a", "#b9c7d8", "#1f6fb2", "#d98c5f", "#4d4d4d"]
    left.bar(
        labels, [s.perplexity for s in scores], yerr=[s.perplexity_error for s in scores], color=colours, capsize=3
    )
    low = min(s.perplexity - s.perplexity_error for s in scores)
    left.set_ylim(bottom=max(0.0, 0.9 * low))
    left.set_ylabel("perplexity per token (axis does not start at 0)")
    for i, score in enumerate(scores):
        left.annotate(
            f"{score.perplexity:.1f}", (i, score.perplexity + score.perplexity_error), ha="center", va="bottom"
        )
    right.bar(labels[1:], [g.mean for g in gains[1:]], yerr=[g.error for g in gains[1:]], color=colours[1:], capsize=3)
    right.axhline(0.0, color="black", linewidth=0.8)
    right.set_ylabel("nats per token vs the backbone (paired)")
    for axis in (left, right):
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    _set_title(figure, title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_recall(report: RecallReport, path: str | Path, title: str) -> None:
    """Accuracy by the distance of the answer, a line for each kind of memory, with standard errors, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    colours = {"memory": "#1f6fb2", "empty memory": "#b9c7d8", "other memory": "#d98c5f"}
    for condition, row in report.correct.items():
        means, errors = zip(*(report.accuracy(condition, distance) for distance in row), strict=True)
        axis.errorbar(list(row), means, errors, label=condition, color=colours[condition], marker="o", capsize=3)
    axis.axhline(report.chance, color="black", linewidth=0.8, linestyle=":", label="chance")
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(report.correct["memory"]), [f"{distance:,}" for distance in report.correct["memory"]])
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("tokens from the pair to its question")
    axis.set_ylabel("answers that are right")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    _set_title(figure, title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _set_title(figure: Any, title: str) -> None:
    """Names of files are in it: they may hold dollar signs, which are no mathematics, and bytes that are no UTF-8."""
    shown = title.encode("utf-8", errors="replace").decode("utf-8")
    figure.suptitle(shown, fontsize=10, parse_math=False, wrap=True)
