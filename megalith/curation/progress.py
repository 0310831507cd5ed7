"""What the user sees on stderr while a corpus is worked on."""

from __future__ import annotations

from megalith.common import units
from megalith.data.corpus.preprocess_progress import Progress as PreprocessProgress


class Progress(PreprocessProgress):
    """Called with the record of each finished part; the bar or the lines of `data preprocess`, in documents."""

    def __init__(self, step: str):
        """step: the name that is shown."""
        super().__init__(title=step)
        self.step, self.documents = step, 0

    def __call__(self, record: dict, total: int) -> None:
        """A part is finished."""
        self.documents += record["documents"]
        if self.size >= total:  # another pass over the same input
            self.size = 0
        super().__call__(record | {"tokens": 0}, total)

    def line(self, total: int, elapsed: float) -> str:
        """One line of numbers."""
        fraction = min(self.size / total, 1.0) if total else 1.0
        rate = f"{units.count(self.documents / max(elapsed, 1e-9))} documents/s"
        return f"{self.step}: {fraction:6.1%} | {units.count(self.documents)} documents | {rate}"
