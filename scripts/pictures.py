"""The pictures of evaluations, where matplotlib is installed.

    draw_report(report, folder / "report.png")              # report: what report.json holds
    draw_waterfall([report, other], Path("waterfall.png"))
"""
from pathlib import Path
from typing import Any

from console import say, whole_or_nothing
from scripts.tables import title


def empty_figure(width: float, height: float) -> Any:
    """A figure of matplotlib, or None where it is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        say("no picture: matplotlib is not installed (pip install matplotlib)")
        return None
    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    return Figure(figsize=(width, height))


def draw_report(report: dict, file: Path) -> None:
    """Four pictures: tokens/s and speedups by category, acceptance by depth, tokens of a step."""
    if (figure := empty_figure(13, 8)) is None:
        return
    from matplotlib import colormaps
    overall, groups = report["overall"], {"all": report["overall"], **report["categories"]}
    drafting = [arm for arm in overall if "acceptance_by_depth" in overall[arm]]
    palette = colormaps["tab10" if len(overall) <= 10 else "tab20"]
    (speeds, ratios), (depths, steps) = figure.subplots(2, 2)
    for n, (arm, f) in enumerate(overall.items()):
        style, width = {"label": arm, "color": palette(n % palette.N)}, 0.8 / len(overall)
        at = [x + middle([*overall], arm) * width for x in range(len(groups))]
        speeds.bar(at, [g[arm]["tokens_per_second"] for g in groups.values()], width, **style)
        if arm != "plain":
            values = [g[arm]["speedup"] for g in groups.values()]
            errors = [[abs(g[arm]["speedup_interval"][i] - g[arm]["speedup"]) for g in groups.values()] for i in (0, 1)]
            ratios.errorbar(at, values, errors, fmt="o", capsize=2, **style)
        if arm in drafting:
            values, width = f["acceptance_by_depth"], 0.8 / len(drafting)
            depths.plot(range(1, len(values) + 1), values, "o-", **style)
            steps.bar([int(n) + middle(drafting, arm) * width for n in f["tokens_per_step"]],
                      [count / f["target_passes"] for count in f["tokens_per_step"].values()], width, **style)
    ratios.axhline(1, color="grey", linewidth=0.8)
    for axes, ylabel in ((speeds, "tokens/s"), (ratios, "speedup over plain decoding")):
        axes.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")
        axes.set_ylabel(ylabel)
    for axes, xlabel, ylabel in ((depths, "depth in the tree", "acceptance, given the draft above"),
                                 (steps, "tokens produced by a step", "share of the steps")):
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
    depths.set_ylim(0, 1)
    # One legend for all four: inside the axes it would lie over what is shown.
    figure.legend(*speeds.get_legend_handles_labels(), loc="lower center", ncols=min(len(overall), 6), frameon=False)
    figure.suptitle(f"{title(report)}, {report['questions']} questions, temperature {report['temperature']:g}, "
                    f"{report['dtype']}, {report['device_name']}")
    save(figure, file, bottom=0.07)


def middle(names: list[str], name: str) -> float:
    """Where a bar stands among those of its group: in widths of a bar, from the group's middle."""
    return names.index(name) - (len(names) - 1) / 2


def draw_waterfall(reports: list[dict], file: Path) -> None:
    """Tokens/s of every arm of the reports, from the slowest to the fastest."""
    several = len({r["checkpoint"] for r in reports}) > 1
    arms = [(arm + f", {Path(r['checkpoint']).name}" * several, f) for r in reports for arm, f in r["overall"].items()]
    bars = sorted(((f["tokens_per_second"], f.get("mean_accept_length"), name) for name, f in arms), key=lambda b: b[0])
    if (figure := empty_figure(9, 1 + 0.4 * len(bars))) is None:
        return
    axes = figure.subplots()
    for n, (speed, length, _) in enumerate(bars):
        text = f" {speed:.1f}" if length is None else f" {speed:.1f}, accepted length {length:.2f}"
        axes.barh(n, speed, color="C0" if length is None else "C1")
        axes.text(speed, n, text, va="center")
    axes.set_yticks(range(len(bars)), [name for *_, name in bars])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.5 * bars[-1][0]), xlabel="tokens/s, batch 1 (orange: with drafts)")
    axes.set_title(f"{title(reports[0])}, {reports[0]['device_name']}", fontsize=9)
    save(figure, file)


def save(figure: Any, file: Path, bottom: float = 0.0) -> None:
    """bottom: share of the height that is left free for a legend."""
    figure.tight_layout(rect=(0, bottom, 1, 1))
    with whole_or_nothing(file, ".part.png") as part:
        figure.savefig(part, dpi=110)
