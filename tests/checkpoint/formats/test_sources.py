"""Sources on other machines: downloads that are cut and resumed, checksums, archives. The server runs in the test."""

import errno
import hashlib
import http.server
import threading
import zipfile

import pytest
import torch

from megalith.checkpoint.formats import sources
from megalith.common.errors import CheckpointError
from megalith.common.locks import LockedError, locked

BODY = bytes(range(256)) * 4000


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.body`; cuts the connection after `server.cut` bytes of a body, `server.cuts` times."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, start = self.server, 0
        server.asked.append((self.headers.get("Range"), self.headers.get("If-Range")))
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        if server.ranges and self.headers.get("Range") and self.headers.get("If-Range") == server.version:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        body = server.body[start:]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", server.version)
        if server.name:
            self.send_header("Content-Disposition", f'attachment; filename="{server.name}"')
        self.end_headers()
        if server.cuts:
            server.cuts -= 1
            body = body[: server.cut]
        self.wfile.write(body)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGALITH_CACHE", str(tmp_path / "cache"))
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.body, made.version, made.name, made.ranges, made.cut, made.cuts, made.asked = (
        BODY,
        '"one"',
        None,
        True,
        300_000,
        0,
        [],
    )
    made.url = f"http://127.0.0.1:{made.server_port}/folder/model.bin?x=1"
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def test_a_cut_download_is_resumed(server):
    server.cuts, notes = 2, []
    path = sources.local(server.url, sha256=hashlib.sha256(BODY).hexdigest(), notice=notes.append)
    assert path.read_bytes() == BODY and path.name == "model.bin"
    assert server.asked == [(None, None), ("bytes=300000-", '"one"'), ("bytes=600000-", '"one"')]
    assert any(hashlib.sha256(BODY).hexdigest() in line for line in notes)
    again = sources.local(server.url, notice=notes.append)
    assert again == path and len(server.asked) == 3 and "already" in notes[-2]


@pytest.mark.slow
def test_a_later_command_resumes(server, monkeypatch):
    """The first one gave up: no server answers any more."""
    monkeypatch.setattr(sources, "MAX_FAILURES", 1)
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    server.cuts, server.cut = 1, 0
    with pytest.raises(
        CheckpointError,
        match=r"must be a file that can be downloaded; found the connection ended after 0 of 1024000 bytes\.",
    ):
        sources.local(server.url)
    server.cuts, server.cut = 1, 500_000
    assert sources.local(server.url).read_bytes() == BODY
    assert server.asked[-1] == ("bytes=500000-", '"one"')


@pytest.mark.parametrize("change", ["version", "ranges"])
def test_another_version_or_no_ranges_begins_anew(server, change):
    server.cuts, server.cut = 1, 1000
    folder = sources.cache_folder() / "a"
    with pytest.raises(OSError, match="the connection ended"):
        folder.mkdir(parents=True)
        sources._resume(server.url, folder / "download.part", folder / "download.json", print)
    if change == "version":
        server.version, server.body = '"two"', BODY[::-1]
    else:
        server.ranges = False
    assert sources.download(server.url, folder, print).read_bytes() == server.body


def test_a_wrong_checksum_is_an_error(server):
    message = r"sha256 must be abc, as --sha256 says; found '.*'. Delete .* and try again"
    with pytest.raises(CheckpointError, match=message):
        sources.local(server.url, sha256="abc")


def test_what_is_not_there(server, monkeypatch):
    monkeypatch.setattr(sources.time, "sleep", lambda seconds: None)
    with pytest.raises(CheckpointError, match="404"):
        sources.local(server.url.replace("/folder/model.bin", "/missing"))
    assert len(server.asked) == 1
    with pytest.raises(CheckpointError, match="must be a file that can be downloaded"):
        sources.local("http://127.0.0.1:9/nothing")


def test_names_stay_in_the_folder(server):
    server.name = "../../escape.zip"
    path = sources.local(server.url)
    assert path.name == "escape.zip" and path.parent.parent == sources.cache_folder()


def test_archives_are_unpacked_once(server, tmp_path):
    file = tmp_path / "model.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/config.json", "{}")
        archive.writestr("../out", "x")
    notes = []
    folder = sources.local(file, notice=notes.append)
    assert (folder / "model/config.json").exists() and not (sources.cache_folder().parent / "out").exists()
    assert sources.local(file, notice=notes.append) == folder and len(notes) == 1
    server.body, server.name = file.read_bytes(), "model.zip"
    assert (sources.local(server.url) / "model/config.json").read_text() == "{}"


def test_a_single_folder_is_the_content_unless_it_is_a_part_of_the_format(server, tmp_path):
    for name, inner in (("model", True), ("release", False), ("iter_0000100", False)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}/a", "")
        assert (sources.local(tmp_path / f"{name}.zip").name == name) == inner


def test_torch_files_are_no_archives(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    assert sources.local(tmp_path / "a.pt") == tmp_path / "a.pt" and sources.local(tmp_path) == tmp_path


def test_what_is_in_the_cache_is_checked(server, tmp_path):
    """A file that lost its end, or an archive's folder that lost a file, is not "in the cache already"."""
    notes = []
    path = sources.local(server.url, notice=notes.append)
    path.write_bytes(BODY[:1000])
    assert sources.local(server.url, notice=notes.append).read_bytes() == BODY
    assert "it is fetched again" in "".join(notes)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x/one", "1")
        archive.writestr("x/two", "22")
    folder = sources.local(tmp_path / "a.zip", notice=notes.append)
    for damage in (lambda: (folder / "two").unlink(), lambda: (folder / "one").write_text("")):
        damage()
        assert sources.local(tmp_path / "a.zip", notice=notes.append) == folder
        assert ((folder / "one").read_text(), (folder / "two").read_text()) == ("1", "22")


def test_one_command_fetches_at_a_time(server, tmp_path):
    folder = sources.cache_folder() / hashlib.sha256(server.url.encode()).hexdigest()[:16]
    with locked(folder), pytest.raises(LockedError, match="what it fetches is then here"):
        sources.local(server.url)
    assert server.asked == []
    sources.local(server.url)
    assert not [each.name for each in sources.cache_folder().iterdir() if "lock" in each.name]


def test_a_full_disk_is_not_the_servers_fault(server, monkeypatch):
    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "_resume", full)
    with pytest.raises(OSError, match="No space left"):
        sources.local(server.url)
