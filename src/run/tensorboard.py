"""TensorBoard's event files: the numbers of metrics.jsonl for `tensorboard --logdir`."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class EventFiles:
    """A folder of event files for each phase, since steps count within a phase. A disk that is full ends them only.

    last: each phase's last step that is kept; TensorBoard forgets the later ones, which a resumed run does again.
    """

    def __init__(self, folder: Path, last: Mapping[str, int]):
        from torch.utils.tensorboard import SummaryWriter  # not above: nothing else needs the tensorboard package

        self.folder, self.last, self.kind = folder, last, SummaryWriter
        self.writers: dict[str, Any] = {}
        self.failed = False
        with self._survivable():
            for path in filter(Path.is_dir, folder.glob("*")):
                self._writer(path.name)

    @contextmanager
    def _survivable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failed = True
            log.warning("No more TensorBoard files in %s (%s): the run goes on.", self.folder, error.strerror)

    def _writer(self, phase: str) -> Any:
        if phase not in self.writers:
            start = self.last.get(phase, -1) + 1
            self.writers[phase] = self.kind(str(self.folder / phase), purge_step=start, flush_secs=20)
        return self.writers[phase]

    def write(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """One point of every metric."""
        if not self.failed:
            with self._survivable():
                for name, value in values.items():
                    self._writer(phase).add_scalar(name, value, step)

    def flush(self) -> None:
        """Onto the disk."""
        if not self.failed:
            with self._survivable():
                for writer in self.writers.values():
                    writer.flush()

    def close(self) -> None:
        """Nothing can be written afterwards."""
        if not self.failed:
            with self._survivable():
                for writer in self.writers.values():
                    writer.close()


def last_steps(path: Path) -> dict[str, int]:
    """The last step of each phase in metrics.jsonl; what is no line of it is passed over."""
    last: dict[str, int] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            last[row["phase"]] = row["step"]
    return last
