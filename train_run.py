"""A training under way, and its files in --out: the head, log.jsonl, curves.png and checkpoint.pt.

    run = Run(folder, head, config, settings, lr=3e-5)
    run.load(device)        # to go on
    run.update()            # after the gradients: a step of the optimizer
    run.save()
"""
import contextlib
import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

import tp
from console import whole_or_nothing, write_atomically
from eagle_head import EagleHead
from train_init import file_weights


class Run:
    """The weights that are trained, their optimizer, the log, and what is written of them.

    ema         decay of an average of the weights, which is then what is evaluated and written; None for the weights
    keeps_best  model.safetensors is the head of the best evaluation so far. Before the first it is the last one saved.

    Nothing random is kept: batches and noise follow from the seed, the rate from the step.
    """

    def __init__(self, folder: Path, head: EagleHead, config: dict, settings: dict[str, str], *, lr: float,
                 ema: float | None = None, keeps_best: bool = False):
        self.folder, self.head, self.config, self.settings = folder, head, config, settings
        self.ema, self.keeps_best = ema, keeps_best
        self.weights = {name: weight for name, weight in head.named_parameters() if weight.requires_grad}
        self.average = {} if ema is None else {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=lr, betas=(0.9, 0.95))
        self.step, self.log = 0, []
        self.saved, self.saved_at = (0, 0), time.monotonic()

    @torch.no_grad()
    def load(self, device: torch.device) -> None:
        state = load_state(self.folder / "checkpoint.pt", device)
        for name, weight in self.weights.items():
            weight.copy_(state["head"][name])
        for name, average in self.average.items():
            average.copy_(state["average"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.log = state["step"], state["log"]
        self.saved = self.step, len(self.log)

    @torch.no_grad()
    def update(self) -> None:
        """One step. The average begins with the young weights, which it forgets: its decay grows to `ema`."""
        self.optimizer.step()
        self.step += 1
        if self.ema is not None:
            decay = min(self.ema, (1 + self.step) / (10 + self.step))
            for name, average in self.average.items():
                average.lerp_(self.weights[name], 1 - decay)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the head has its averages for weights, where there are any."""
        def swap() -> None:
            for name, average in self.average.items():
                self.weights[name].data, self.average[name] = average, self.weights[name].data

        swap()
        try:
            yield
        finally:
            swap()

    def best(self) -> dict | None:
        """The entry of the log with the longest chain on held-out dialogues; the first of several."""
        evaluations = [entry for entry in self.log if "eval_chain_length" in entry]
        return max(evaluations, key=lambda entry: entry["eval_chain_length"], default=None)

    def keep_best(self) -> None:
        """To be called after an evaluation, whose entry is the last of the log."""
        if self.keeps_best and tp.writes() and self.best() is self.log[-1]:
            self.write_head()

    def write_head(self) -> None:
        with self.averaged(), whole_or_nothing(self.folder / "model.safetensors", ".part") as part:
            save_file(file_weights(self.head), part, metadata={"format": "pt"})
        write_atomically(self.folder / "config.json", json.dumps(self.config, indent=1) + "\n")

    def save(self) -> None:
        """Write what is new since the last time."""
        if tp.writes() and self.saved != (self.step, len(self.log)):
            if not all(weight.isfinite().all() for weight in self.weights.values()):
                raise ValueError(f"weights are not finite after step {self.step}: the last checkpoint stands; "
                                 "a lower --lr may help")
            if not self.keeps_best or self.best() is None:
                self.write_head()
            write_atomically(self.folder / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in self.log))
            with whole_or_nothing(self.folder / "checkpoint.pt", ".part") as part:
                torch.save({"settings": self.settings, "step": self.step, "log": self.log,
                            "head": {name: weight.detach() for name, weight in self.weights.items()},
                            "average": self.average,
                            "optimizer": self.optimizer.state_dict()}, part)
        self.saved, self.saved_at = (self.step, len(self.log)), time.monotonic()


def load_state(file: Path, device: torch.device | None = None) -> dict:
    """A checkpoint.pt. Without a device its tensors are mapped into memory, not read."""
    try:
        return torch.load(file, map_location=device or "cpu", mmap=device is None, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is corrupt or truncated: {str(error).splitlines()[0]}") from None


def draw_curves(log: list[dict], file: Path) -> None:
    """Losses and accuracies as a picture, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    known = {key for entry in log for key in entry}
    kinds = [kind for kind in ("smooth_l1", "cross_entropy", "agreement", "top1") if kind in known]
    figure = Figure(figsize=(4 * len(kinds), 3.5))
    for axis, kind in zip(figure.subplots(1, len(kinds)), kinds):
        for key in (kind, f"eval_{kind}"):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axis.plot(*zip(*points), label=key) if points else None
        axis.set_xlabel("step")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)
