"""Progress: numbers in a line, a bar on a terminal."""

import io

from megalith.data.corpus.preprocess_progress import Progress


def test_line_and_plain_output():
    stream = io.StringIO()
    progress = Progress(stream, interval=0)
    progress({"size": 250, "bytes": 1_000_000, "tokens": 300_000}, 1000)
    assert stream.getvalue().startswith(" 25.0% | 976.56 KiB read | 300.00 k tokens | ")
    assert progress.line(1000, 2.0).endswith("| 0.5 MB/s | 150.00 k tokens/s | 6.0 s left")
    progress.close()


def test_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = Progress(stream)
    progress({"size": 10, "bytes": 10, "tokens": 1}, 10)
    progress.close()
    assert "encoding" in stream.getvalue()
