"""What a run tells others while it trains: the protocol of callbacks, and TensorBoard's."""

from pathlib import Path
from typing import Any

from .config import RunError

FOLDER = "tensorboard"


class Callback:
    """Base of callbacks, whose methods do nothing.

    Rank 0 alone calls them, with the lines that it has written to metrics.jsonl, so that nothing is
    measured or synchronised for their sake. An exception that a method raises ends the run; the
    last checkpoint remains. A resumed run tells the steps after its checkpoint again.
    """

    def on_begin(self, config: dict[str, Any], step: int) -> None:
        """A run begins, or goes on.

        Args:
            config: every setting, a field of :class:`Config` each.
            step: steps done before; what an earlier process told of later ones is void.
        """

    def on_step(self, step: int, values: dict[str, Any]) -> None:
        """A step's numbers are there, every --log-every steps.

        Args:
            step: steps done, over all epochs.
            values: "epoch" (from 1), "loss" and "lr" of the step.
        """

    def on_evaluation(self, step: int, values: dict[str, Any]) -> None:
        """An evaluation is over.

        Args:
            step: steps done.
            values: "epoch", and accuracies in [0, 1] such as "knn", "probe" and "probe_best".
        """

    def on_epoch(self, step: int, values: dict[str, Any]) -> None:
        """An epoch is over, after its evaluation if it had one.

        Args:
            step: steps done.
            values: the epoch's line of metrics.jsonl: "epoch", mean "loss", "lr", "images_per_s",
                "step_ms" and whatever else was measured; None where nothing was.
        """

    def on_end(self) -> None:
        """The run ends in whatever way."""


class TensorBoard(Callback):
    """Write scalars for TensorBoard.

    Args:
        run: run folder; the events go to its folder "tensorboard".

    Raises:
        RunError: the package tensorboard is missing.
    """

    def __init__(self, run: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RunError(
                f"--tensorboard needs tensorboard ({error}): pip install tensorboard"
            ) from error
        self.folder, self._writer_of = run / FOLDER, SummaryWriter

    def on_begin(self, config: dict[str, Any], step: int) -> None:
        # Events of an earlier process after this step are hidden.
        self.writer = self._writer_of(str(self.folder), purge_step=step + 1 if step else None)
        if not step:
            lines = "\n".join(f"| {name} | {value} |" for name, value in config.items())
            self.writer.add_text("settings", f"| setting | value |\n|---|---|\n{lines}", 0)

    def on_step(self, step: int, values: dict[str, Any]) -> None:
        self._add("step", step, values)

    def on_evaluation(self, step: int, values: dict[str, Any]) -> None:
        self._add("evaluation", step, values)

    def on_epoch(self, step: int, values: dict[str, Any]) -> None:
        self._add("epoch", step, values)

    def on_end(self) -> None:
        self.writer.close()

    def _add(self, group: str, step: int, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(f"{group}/{name}", value, step)
