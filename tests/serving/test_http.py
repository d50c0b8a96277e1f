"""A running Space against visitors who send what they should not: a tiny one, asked over HTTP."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import pytest

pytest.importorskip("gradio")

from cellglot.serving import TooSlow, UploadError, blocks, gate, in_words, launch, model_queue, uploaded_cells
from cellglot.serving.interface import UPLOADS

SECRET = "what only the server should read"
# Patient, as machines that test are busy
http = httpx.Client(timeout=60)
# Sessions that the tiny Space remembers
CAPACITY = 3


@dataclass
class Tiny:
    """A Space that keeps the text of an upload for its session, and what a test needs to see of it."""

    demo: Any
    uploads: Path
    secret: Path
    go_on: Event
    served: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self.demo.local_url.rstrip("/")

    def call(self, api: str, *data: Any, session: str | None = None) -> tuple[str, Any]:
        """The last event of a call, and its data."""
        joined = self.join(api, *data, session=session)
        assert joined.status_code == 200, joined.text
        answer = http.get(f"{self.url}/gradio_api/call/{api}/{joined.json()['event_id']}", timeout=20).text
        event, said = answer.strip().split("\n\n")[-1].split("\n")
        return event.removeprefix("event: "), json.loads(said.removeprefix("data: "))

    def join(self, api: str, *data: Any, session: str | None = None) -> httpx.Response:
        body = {"data": data} | ({} if session is None else {"session_hash": session})
        return http.post(f"{self.url}/gradio_api/call/{api}", json=body)

    def refused(self, api: str, *data: Any, session: str | None = None) -> str:
        """The words that a call ends with, which name nothing of the server."""
        event, said = self.call(api, *data, session=session)
        assert event == "error", said
        assert str(self.uploads.parent) not in said["error"]
        assert os.getcwd() not in said["error"]
        return said["error"]

    def upload(self, content: bytes, name: str = "mine.h5ad") -> dict[str, Any]:
        """What a client sends of a file that it uploaded."""
        answer = http.post(f"{self.url}/gradio_api/upload", files={"files": (name, content)})
        assert answer.status_code == 200, answer.text
        return file_data(answer.json()[0])

    def files(self) -> list[Path]:
        return [path for path in self.uploads.rglob("*") if path.is_file()]


def file_data(path: Any) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    import gradio as gr

    home = tmp_path_factory.mktemp("space")
    (home / "secret.h5ad").write_text(SECRET)
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        patch.setenv("GRADIO_TEMP_DIR", str(home / "uploads"))
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        go_on, served = Event(), []
        # Of a server that was killed
        left = home / "uploads" / UPLOADS / "left"
        left.mkdir(parents=True)
        (left / "cells.h5ad").touch()
        os.utime(left, (0, 0))

        @in_words
        def analyse(path: str | None) -> Iterator[Any]:
            text = uploaded_cells(path, Path.read_text)
            yield text, f"read {text}"

        @in_words
        def look(kept: str | None, word: str) -> Iterator[Any]:
            if kept is None:
                raise ValueError("Expected cells, found none: analyse a file first.")
            yield f"{kept} {word.upper()}"

        @in_words
        def fail(kind: str) -> Iterator[Any]:
            if kind == "json":
                json.loads("{")
            errors = {
                "key": KeyError(f"{home}/table"),
                "os": FileNotFoundError(2, "No such file", f"{home}/model"),
                "ours": ValueError("Expected this, found <b>."),
                "upload": UploadError("Expected a file."),
                "slow": TooSlow("This took too long."),
                "gradio": gr.Error("Said by hand."),
            }
            raise errors[kind]
            yield

        @in_words
        def wait(name: str) -> Iterator[Any]:
            served.append(name)
            assert go_on.wait(100)
            yield name

        with blocks("Tiny") as demo:
            kept, file, word, said = gr.State(time_to_live=60), gr.File(file_types=[".h5ad"]), gr.Textbox(), gr.Text()
            gr.Button().click(analyse, file, [kept, said], api_name="analyse", **model_queue(said))
            gr.Button().click(look, [kept, word], said, api_name="look", **model_queue(said))
            gr.Button().click(fail, word, said, api_name="fail", **model_queue(said))
            gr.Button().click(wait, word, said, api_name="wait", **model_queue(said))
        launch(
            demo,
            prevent_thread_lock=True,
            quiet=True,
            server_name="127.0.0.1",
            server_port=port,
            state_session_capacity=CAPACITY,
        )
        go_on.set()
        yield Tiny(demo, Path(os.environ["GRADIO_TEMP_DIR"]), home / "secret.h5ad", go_on, served)
        demo.close(verbose=False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The hosts that this process, the server's, looks up, other than the server's own."""
    found: list[Any] = []
    look_up = socket.getaddrinfo

    def watched(host: Any, *arguments: Any, **options: Any) -> Any:
        if host != "127.0.0.1":
            found.append(host)
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", watched)
    return found


@pytest.fixture
def inside() -> Iterator[tuple[str, list[str]]]:
    """A page that only the server can reach, and what was asked of it."""
    hits: list[str] = []

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", hits
    server.shutdown()
    server.server_close()


def test_addresses_that_a_visitor_names_are_not_asked(
    space: Tiny, inside: tuple[str, list[str]], asked: list[Any]
) -> None:
    here, hits = inside
    for path in (f"http://{here}/x.h5ad", "https://huggingface.co/x.h5ad", "http://[::1]/x.h5ad", "ftp://a/x.h5ad"):
        assert "Expected an uploaded file" in space.refused("analyse", file_data(path))
        assert "Expected an uploaded file" in space.refused("analyse", [file_data(path)])
        # Gradio looks for files in the inputs of every component
        assert "Expected an uploaded file" in space.refused("fail", file_data(path))
        assert http.get(f"{space.url}/gradio_api/file={path}").status_code == 404
        assert http.get(f"{space.url}/gradio_api/proxy={path}").status_code == 404
    elsewhere = {**file_data(space.upload(b"own")["path"]), "url": f"http://{here}/x.h5ad"}
    assert space.call("analyse", elsewhere)[0] == "complete"
    assert hits == []
    assert asked == []


def test_files_that_nobody_uploaded_are_not_read(space: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(space.secret.parent)
    link = space.uploads / "link.h5ad"
    space.uploads.mkdir(exist_ok=True)
    link.symlink_to(space.secret)
    places = ["/etc/passwd", "secret.h5ad", space.secret, space.uploads / "../../secret.h5ad", link, f"{link}\0.h5ad"]
    for place in [*map(str, places), ".", "", "~/x.h5ad", "x" * 5000]:
        assert "Expected an uploaded file" in space.refused("analyse", file_data(place))
    link.unlink()
    assert space.secret.read_text() == SECRET
    assert "Expected an .h5ad file, found none" in space.refused("analyse", file_data(str(space.uploads / "no.h5ad")))


@pytest.mark.parametrize(
    "route",
    [
        *("file={}", "file/{}", "file%3D{}", "run/analyse", "api/analyse", "component_server", "process_recording"),
        *("deep_link?session_hash=a", "runs", "run-history/buckets", "vibe-code", "custom_component/a/client/b/c"),
    ],
)
def test_what_the_page_does_not_need_is_not_there(space: Tiny, route: str) -> None:
    path = route.format(space.upload(b"own")["path"])
    for method in ("GET", "POST"):
        answer = http.request(method, f"{space.url}/gradio_api/{path}", json={} if method == "POST" else None)
        assert answer.status_code == 404
        assert answer.text == "There is no such page."


def test_browsers_are_told_to_load_nothing_from_other_hosts(space: Tiny) -> None:
    for path in ("", "config", "gradio_api/info", "gradio_api/nothing"):
        policy = http.get(f"{space.url}/{path}").headers["content-security-policy"]
        assert policy.startswith("default-src 'self' ")
        assert "http" not in policy
        assert "*" not in policy


def test_the_page_and_the_client_find_what_they_need(space: Tiny) -> None:
    from gradio_client import Client, handle_file

    assert http.get(space.url).status_code == 200
    assert http.get(f"{space.url}/gradio_api/info").json()["named_endpoints"]
    api = Client(space.url, verbose=False, analytics_enabled=False)
    (space.secret.parent / "mine.h5ad").write_text("mine")
    assert api.predict(handle_file(space.secret.parent / "mine.h5ad"), api_name="/analyse") == "read mine"
    assert api.predict("all", api_name="/look") == "mine ALL"


@pytest.mark.parametrize(
    "name",
    [
        *("../../x.h5ad", "/etc/x.h5ad", "C:\\Windows\\x.h5ad", "CON", "..", ".", ".h5ad", "x" * 3000),
        *("cells 漢字 é.h5ad", "a\0b.h5ad", "%2e%2e%2fx.h5ad"),
    ],
)
def test_a_name_does_not_decide_where_an_upload_lies(space: Tiny, name: str) -> None:
    before = set(space.files())
    path = Path(space.upload(b"own", name)["path"])
    assert set(space.files()) - before == {path}
    assert path.name == "cells.h5ad"
    assert path.parent.parent == space.uploads
    assert len(path.parent.name) == 32


def test_visitors_with_the_same_file_do_not_take_it_from_each_other(space: Tiny) -> None:
    one, other = space.upload(b"same"), space.upload(b"same")
    assert one["path"] != other["path"]
    for mine in (one, other):
        assert space.call("analyse", mine) == ("complete", [None, "read same"])
        assert not Path(mine["path"]).exists()
    assert "removed, so choose it again" in space.refused("analyse", one)


def form(*parts: bytes) -> bytes:
    return b"".join(b"--B\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + b"--B--\r\n"


def file_part(n: int) -> bytes:
    return b'name="files"; filename="x.h5ad"\r\n\r\n' + b"x" * n


LIMIT = 300_000
REFUSED: dict[str, tuple[bytes, int]] = {
    "too large": (form(file_part(LIMIT + 1)), 413),
    "two files": (form(file_part(5), file_part(5)), 400),
    "text in place of a file": (form(b'name="files"\r\n\r\n' + b"x" * 50), 400),
    "no part": (b"--B--\r\n", 400),
    "long headers": (form(b'name="files"; filename="' + b"x" * 9000 + b'"\r\n\r\nx'), 400),
    "no form": (b"x" * 1000, 400),
}


@pytest.mark.parametrize("chunked", [False, True], ids=["declared", "chunked"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_uploads_leave_nothing(space: Tiny, name: str, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_UPLOAD", LIMIT)
    before = set(space.uploads.glob("*"))
    content, status = REFUSED[name]
    parts = (content[i : i + 50_000] for i in range(0, len(content), 50_000))
    answer = http.post(
        f"{space.url}/gradio_api/upload",
        content=parts if chunked else content,
        headers={"Content-Type": "multipart/form-data; boundary=B"},
    )
    assert answer.status_code == status, answer.text
    assert set(space.uploads.glob("*")) == before


def begin_upload(space: Tiny, *headers: bytes) -> socket.socket:
    """A connection that has sent the first bytes of an upload."""
    address = httpx.URL(space.url)
    connection = socket.create_connection((address.host, address.port), timeout=20)
    lines = [b"POST /gradio_api/upload HTTP/1.1", b"Host: 127.0.0.1", *headers]
    lines += [b"Content-Type: multipart/form-data; boundary=B", b"", form(file_part(100_000))[:90_000]]
    connection.sendall(b"\r\n".join(lines))
    return connection


def until(condition: Any, seconds: float = 20) -> bool:
    """Whether it holds, within the time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_aborted_uploads_leave_nothing(space: Tiny) -> None:
    before = set(space.uploads.glob("*"))
    with begin_upload(space, b"Content-Length: 100200"):
        assert until(lambda: set(space.uploads.glob("*")) != before)
    assert until(lambda: set(space.uploads.glob("*")) == before)


def test_slow_uploads_end_and_leave_nothing(space: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "UPLOAD_SECONDS", 0.3)
    before = set(space.uploads.glob("*"))
    with begin_upload(space, b"Content-Length: 100200") as connection:
        assert b" 408 " in connection.recv(100)
    assert set(space.uploads.glob("*")) == before


def test_uploads_fill_no_disk(space: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_STORED", gate.stored_bytes(space.uploads) + gate.LEAST + 100_000)
    # A byte counts as LEAST, so that their number is bounded too
    space.upload(b"x")
    full = http.post(f"{space.url}/gradio_api/upload", files={"files": ("x.h5ad", b"x" * 100_001)})
    assert full.status_code == 503
    assert "Too many files" in full.text


def test_uploads_on_their_way_count_as_what_they_declare(space: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_STORED", 200_000)
    monkeypatch.setattr(gate, "stored_bytes", lambda _: 0)
    before = set(space.uploads.glob("*"))
    with begin_upload(space, b"Content-Length: 195000"):
        assert until(lambda: set(space.uploads.glob("*")) != before)
        another = http.post(f"{space.url}/gradio_api/upload", files={"files": b"x" * 9000})
    assert another.status_code == 503
    assert until(lambda: set(space.uploads.glob("*")) == before)
    space.upload(b"x" * 9000)


def test_other_requests_have_small_bodies(space: Tiny) -> None:
    joined = space.join("fail", "x" * gate.MAX_BODY)
    assert joined.status_code == 413
    assert "at most 1 MB" in joined.text
    in_chunks = http.post(f"{space.url}/gradio_api/queue/join", content=(b"x" * 50_000 for _ in range(21)))
    assert in_chunks.status_code == 413


def test_the_server_sweeps_from_its_start(space: Tiny) -> None:
    assert until(lambda: not (space.uploads / "left").exists())


def test_the_sweep_takes_what_is_old(space: Tiny) -> None:
    old, new = Path(space.upload(b"old")["path"]), Path(space.upload(b"new")["path"])
    left = space.uploads / "tmp123"
    left.touch()
    for item in (old.parent, left):
        os.utime(item, (0, time.time() - gate.MAX_AGE - 1))
    gate.sweep(space.demo._queue, gate.MAX_AGE)
    assert new.exists()
    assert not old.parent.exists()
    assert not left.exists()


def test_results_that_nobody_collects_are_few_and_go(space: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_UNREAD", 5)
    unread, session = space.demo._queue.pending_messages_per_session, secrets.token_hex(8)
    for _ in range(4):
        assert space.join("fail", "ours", session=session).status_code == 200
    # Each has an estimate, a start and an end; the newest are kept
    events = space.demo._queue.pending_event_ids_session[session]
    assert until(lambda: not events & set(space.demo._queue.event_ids_to_events))
    assert unread[session].qsize() == 5
    gate.sweep(space.demo._queue, gate.MAX_AGE)
    assert session in unread
    unread[session].last_sent -= gate.MAX_AGE + 1
    gate.sweep(space.demo._queue, gate.MAX_AGE)
    assert session not in unread


@pytest.mark.parametrize("kind", ["key", "os", "json", "unknown"])
def test_errors_that_nobody_foresaw_tell_nothing_of_the_server(
    space: Tiny, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert space.refused("fail", kind) == gate.UNEXPECTED
    assert caplog.records[-1].exc_info


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        # What Gradio shows as HTML
        ("ours", "Expected this, found &lt;b&gt;."),
        ("upload", "Expected a file."),
        ("slow", "This took too long."),
        ("gradio", "Said by hand."),
    ],
)
def test_errors_that_people_can_mend_are_shown(space: Tiny, kind: str, words: str) -> None:
    assert space.refused("fail", kind) == words


@pytest.mark.parametrize(
    "data",
    [
        *([5], ["x"], [[]], [{}], [file_data(5)], [file_data(None)], [{"path": {"path": "x"}}], [], [1, 2, 3], [True]),
        [{"meta": {"_type": "gradio.FileData"}}],
        # As deep as JSON is read
        [json.loads("[" * 400 + "]" * 400)],
    ],
    ids=repr,
)
def test_inputs_of_wrong_types_get_a_sentence(space: Tiny, data: list[Any]) -> None:
    assert space.refused("analyse", *data).endswith(".")


@pytest.mark.parametrize("word", [None, 5, ["x"], {"a": 1}, True], ids=repr)
def test_words_of_wrong_types_get_a_sentence(space: Tiny, word: Any) -> None:
    session = secrets.token_hex(8)
    space.call("analyse", space.upload(b"mine"), session=session)
    event, said = space.call("look", word, session=session)
    assert event == "complete" or said["error"] == gate.UNEXPECTED
    assert space.call("look", "still", session=session) == ("complete", ["mine STILL"])


def test_each_session_sees_its_own_and_the_oldest_are_forgotten(space: Tiny) -> None:
    sessions = [secrets.token_hex(8) for _ in range(CAPACITY + 2)]
    for i, session in enumerate(sessions):
        space.call("analyse", space.upload(f"file {i}".encode()), session=session)
    for i in (4, 3, 2):
        assert space.call("look", "x", session=sessions[i]) == ("complete", [f"file {i} X"])
    for i in (0, 1):
        assert "analyse a file first" in space.refused("look", "x", session=sessions[i])


def test_the_queue_is_bounded_and_those_who_leave_do_not_wait(space: Tiny) -> None:
    space.go_on.clear()
    space.served.clear()
    waiting = space.demo._queue
    assert space.join("wait", "first").status_code == 200
    assert until(lambda: space.served == ["first"])
    leaves = secrets.token_hex(8)
    space.join("wait", "leaves", session=leaves)
    with http.stream("GET", f"{space.url}/gradio_api/queue/data?session_hash={leaves}") as reading:
        # Kept, as what reads the answer closes it when it goes
        messages = reading.iter_text()
        assert "estimation" in next(messages)
        assert len(waiting) == 1
    assert until(lambda: len(waiting) == 0)
    for i in range(64):
        assert space.join("wait", str(i)).status_code == 200
    full = space.join("wait", "one too many")
    assert full.status_code == 503
    assert "Queue is full" in full.json()["detail"]
    space.go_on.set()
    assert until(lambda: len(space.served) == 65)
    assert "leaves" not in space.served
    assert "one too many" not in space.served


def test_nobody_can_end_the_queue(space: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradio's ends with a message for a session that it forgot, of which it remembers 2,000."""
    space.go_on.clear()
    space.served.clear()
    queue = space.demo._queue
    queue.pending_messages_per_session.clear()
    monkeypatch.setattr(queue.pending_messages_per_session, "max_size", 3)
    space.join("wait", "first")
    assert until(lambda: space.served == ["first"])
    space.join("wait", "second", session="forgotten")
    space.join("wait", "third")
    for _ in range(4):
        session = secrets.token_hex(8)
        event = space.join("wait", "never", session=session).json()["event_id"]
        body = {"session_hash": session, "fn_index": 3, "event_id": event}
        assert http.post(f"{space.url}/gradio_api/cancel", json=body).status_code == 200
    assert "forgotten" not in queue.pending_messages_per_session
    space.go_on.set()
    assert until(lambda: space.served == ["first", "second", "third"])
    assert space.call("wait", "another") == ("complete", ["another"])


QUIET = """
import os, sys, time
lines = []
sys.addaudithook(
    lambda event, found: lines.append((event, str(found)))
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname") else None
)
# First, as in every Space
import gradio as gr
import httpx
from cellglot.serving import blocks, in_words, launch
with blocks("Quiet") as demo:
    text = gr.Textbox()
    gr.Button().click(in_words(lambda word: iter([word])), text, text, api_name="say")
launch(demo, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
httpx.get(demo.local_url)
joined = httpx.post(f"{demo.local_url}gradio_api/call/say", json={"data": ["said"]}).json()
print(httpx.get(f"{demo.local_url}gradio_api/call/say/{joined['event_id']}").text.split()[-1])
# Threads that call home start late
time.sleep(1)
print(len(lines) > 0, *(line for line in lines if "127.0.0.1" not in line[1]), sep="\\n")
os._exit(0)
"""


def test_nothing_is_sent_elsewhere(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("GRADIO_", "HF_"))}
    environment["GRADIO_TEMP_DIR"] = str(tmp_path)
    command = [sys.executable, "-u", "-c", QUIET]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.splitlines() == ['["said"]', "True"], done.stdout + done.stderr
