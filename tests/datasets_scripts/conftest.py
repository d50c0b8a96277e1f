"""A web server on this machine, in the place of the corpora's publishers."""

import dataclasses
import threading
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cellglot.datasets_scripts.corpus import CorpusBuilder


class Handler(SimpleHTTPRequestHandler):
    """Files of a folder; what was asked for is kept, and bodies are cut short on demand."""

    def __init__(self, *args, publisher: "Publisher", **kwargs):
        self.publisher = publisher
        super().__init__(*args, directory=str(publisher.folder), **kwargs)

    def do_GET(self) -> None:
        name = self.path.strip("/")
        self.publisher.downloads.append(name)
        if name not in self.publisher.cut_short:
            super().do_GET()
            return
        body = (self.publisher.folder / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True

    def log_message(self, *args) -> None:
        pass


class Publisher:
    """Serves `folder` at `url`, once `serve` has pointed a builder's sources here.

    downloads  names of the files asked for, in order
    cut_short  names of the files of which only the first half is sent
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self._monkeypatch = folder, monkeypatch
        self.downloads: list[str] = []
        self.cut_short: set[str] = set()
        self.url = ""

    def serve(self, builder: type[CorpusBuilder], checksums: Mapping[str, str | None] | None = None) -> None:
        """Sends the builder here for its files, which keep their published names.

        checksums  file name -> checksum in the place of the published one, which the files of a test cannot have
        """
        checksums = checksums or {}

        def here(source):
            name = source.file_name
            return dataclasses.replace(source, url=f"{self.url}/{name}", checksum=checksums.get(name))

        sources = {config: [here(source) for source in published] for config, published in builder.SOURCES.items()}
        self._monkeypatch.setattr(builder, "SOURCES", sources)


@pytest.fixture
def file_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    """A publisher on 127.0.0.1 of the files that the test puts in its `folder`."""
    folder = tmp_path / "published"
    folder.mkdir()
    publisher = Publisher(folder, monkeypatch)
    # The other tests are offline; this server is no network.
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, publisher=publisher)) as server:
        publisher.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield publisher
        server.shutdown()
        thread.join()
