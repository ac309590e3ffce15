"""What a vendor's user sees: when a customer connects, what was agreed on, how far the training is, and its end.

All of it is known to the vendor anyway: counts of what was sent, and its own steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from sotto.split.protocol import VendorService


class Watch:
    """Is told what happens, by the threads of the service; this one keeps it to itself."""

    def connected(self, service: VendorService, again: bool) -> None:
        """A customer has said hello and agreed; `again` if this process has seen it before."""

    def training(self, service: VendorService) -> None:
        """The upload is whole, and the training begins or goes on."""

    def stepped(self, step: int) -> None:
        """A step is done."""

    def trained(self, service: VendorService) -> None:
        """All steps are done."""

    def failed(self) -> None:
        """The training has ended otherwise; the error itself is told by whoever started the vendor."""

    def asked(self, texts: int) -> None:
        """So many texts were scored."""

    def ended(self) -> None:
        """The vendor was stopped."""


class OnScreen(Watch):
    """Lines on standard error, and a progress bar where that is a terminal."""

    def __init__(self, console: Console | None = None):
        self._console = console or Console(stderr=True, highlight=False)
        columns = (
            TextColumn("step {task.completed}/{task.total}"), BarColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("train")
        self._scored = 0

    def connected(self, service: VendorService, again: bool) -> None:
        inbox, config = service.inbox, service.vendor.config
        assert inbox is not None
        manifest, agreed = inbox.manifest, service.vendor.agreement
        if again:
            self._say(f"the customer is connected again: {inbox.received} of {len(manifest.pieces)} pieces are here")
            return
        blocks = f"{agreed.layer} block{'s' if agreed.layer != 1 else ''}"
        self._say(
            f"a customer is connected: {manifest.examples:,} texts in {len(manifest.pieces)} pieces, of which "
            f"{inbox.received} are here; cut above {blocks}, labels {agreed.labels}; agreed on, "
            f"{config.steps:,} steps of {min(config.run.expected_batch_size, manifest.examples):,} texts"
        )

    def training(self, service: VendorService) -> None:
        vendor, steps = service.vendor, service.vendor.config.steps
        trained = sum(p.numel() for p in vendor.optimizer.parameters.values())
        self._say(f"the upload is here: training {trained:,} parameters for {steps:,} steps -> {service.run.path}")
        self._bar.update(self._task, total=steps)
        self._bar.start()

    def stepped(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def trained(self, service: VendorService) -> None:
        self._bar.stop()
        self._say(f"trained: {service.vendor.step:,} of {service.vendor.config.steps:,} steps. "
                  "Queries are answered until Ctrl-C")  # fmt: skip

    def failed(self) -> None:
        self._bar.stop()

    def asked(self, texts: int) -> None:
        if not self._scored:
            self._say("the customer asks for scores")
        self._scored += texts

    def ended(self) -> None:
        self._say(f"ended; {self._scored:,} texts were scored")

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, markup=False)
