"""Who may ask, and how: foreign hosts and pages, tokens, large and slow bodies, odd paths."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.access import MOST_UPLOAD_BYTES, access_for
from tests.factories import Ruiji, only_line
from tests.serve.conftest import Served, start

TOKEN = "correct-horse-battery"


def test_every_answer_keeps_browsers_from_giving_it_to_others(served: Served) -> None:
    for path in ("/healthz", "/nowhere", "/objects?count=0", "/openapi.json", "/metrics", "/failures"):
        headers = served.get(path).headers
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in served.get(path, Origin="http://evil.example").headers


def test_a_browser_gets_a_page_where_there_is_nothing_and_a_script_is_told(served: Served) -> None:
    asks = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    answer = served.get("/no%3Cscript%3Ealert(1)%3C/script%3E%22%26%3Fx%FF%E2%80%AE", **asks)
    assert (answer.status, answer.headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
    assert answer.headers["cache-control"] == "no-store"
    text = answer.body.decode()
    assert r"<code>/no&lt;script&gt;alert(1)&lt;/script&gt;&quot;&amp;?x\xff\u202e</code>" in text
    assert '<a href="/">' in text and "<script" not in text
    for accept in ("*/*", "application/json"):
        assert "there is no route /nowhere" in served.get("/nowhere", Accept=accept).error
    # A route is there, and what it was asked for is not.
    assert "nobody" in served.get("/similar/nobody", **asks).error


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "127.0.0.1@evil.example", "[::1", "*"]
)
def test_a_host_that_is_not_ours_is_refused(served: Served, host: str) -> None:
    answer = served.get("/healthz", Host=host)
    assert (answer.status, "--web-name" in answer.error) == (421, True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:1234", "[::1]:80"])
def test_loopback_is_ours_by_every_name(served: Served, host: str) -> None:
    assert served.get("/healthz", Host=host).status == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "", "http://127.0.0.1:1", "ftp://127.0.0.1"])
def test_a_search_must_come_from_our_own_page(served: Served, origin: str) -> None:
    answer = served.search(b"x", Origin=origin)
    assert (answer.status, f"Origin: {served.origin}" in answer.error) == (403, True)


def test_a_body_must_be_of_a_kind_that_no_foreign_form_can_send(served: Served) -> None:
    own = {"Origin": served.origin}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/octet-stream"):
        assert served.ask("POST", "/search", b"x", Content_Type=kind, **own).status == 415
    multipart = {"Content_Type": "multipart/form-data; boundary=sep"}
    assert served.ask("POST", "/objects", b"x", **multipart, **own).status == 415
    assert served.ask("DELETE", "/objects/x", b"{}", Content_Type="application/json", **own).status == 405
    for body in (b"", b"--sep", b"--sep--", b"\r\n" * 1000, b"--sep\r\nContent-Disposition: form-data\r\n\r\nx"):
        answer = served.ask("POST", "/search", body, **multipart, **own)
        assert answer.status in (400, 422) and answer.error


def test_a_body_that_is_too_large_is_refused_before_it_is_read(served: Served) -> None:
    head = (
        "POST /search HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n"
        "Content-Type: multipart/form-data; boundary=sep\r\n"
    )
    with served.raw() as connection:
        connection.sendall(f"{head}Content-Length: {MOST_UPLOAD_BYTES + 1}\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
    # And one that does not say its size, once it has sent too much.
    with served.raw() as connection:
        begin = b'--sep\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n'
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n{len(begin):x}\r\n".encode() + begin + b"\r\n")
        chunk = b"100000\r\n" + bytes(1 << 20) + b"\r\n"
        try:
            for _ in range((MOST_UPLOAD_BYTES >> 20) + 8):
                connection.sendall(chunk)
        except OSError:
            pass
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")
    assert served.get("/healthz").status == 200


def test_what_is_no_http_is_refused_without_a_traceback(served: Served) -> None:
    head = "Host: localhost\r\nOrigin: http://localhost\r\nContent-Type: application/json\r\n"
    for route in ("retry", "duplicates/stop", "logout", "decisions"):
        for _ in range(3):
            with served.raw() as connection:
                connection.sendall(f"POST /{route} HTTP/1.1\r\n{head}Transfer-Encoding: chunked\r\n\r\nZZ\r\n".encode())
                assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert served.get("/healthz").status == 200
    assert "Traceback" not in served.log.read_text()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the body is not JSON: "),
        (b"[" * 10_000, "the body cannot be read: maximum recursion depth exceeded"),
        (b'{"decisions": ' + b"1" * 5000 + b"}", "the body cannot be read: Exceeds the limit"),
        (b'"\xff"', "the body cannot be read: 'utf-8' codec can't decode byte 0xff"),
        (b"", "body: Field required"),
    ],
)
def test_why_a_body_is_not_understood_is_said(served: Served, body: bytes, said: str) -> None:
    own = {"Origin": served.origin, "Content_Type": "application/json"}
    answer = served.ask("POST", "/decisions", body, **own)
    assert answer.status in (400, 422) and answer.error.startswith(said)


def test_a_search_is_with_one_picture_that_is_a_file(served: Served) -> None:
    own = {"Origin": served.origin, "Content_Type": "multipart/form-data; boundary=sep"}
    text = b'--sep\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n'
    file = text.replace(b'"image"', b'"image"; filename="x"')
    for body, said in ((text, "image: send it as a file, with a filename"), (2 * file, "send one picture")):
        answer = served.ask("POST", "/search", body + b"--sep--\r\n", **own)
        assert answer.status == 422 and answer.error.startswith(said)


def test_slow_clients_hold_up_nobody(served: Served) -> None:
    begun = []
    for _ in range(50):
        connection = served.raw()
        connection.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n")
        begun.append(connection)
    for connection in begun[:25]:
        connection.sendall(b"Content-Type: multipart/form-data; boundary=sep\r\nContent-Length: 1000\r\n\r\n--s")
    started = time.monotonic()
    assert served.get("/objects?count=1").status == 200
    assert time.monotonic() - started < 10
    for connection in begun:
        connection.close()


@pytest.mark.parametrize(
    "path",
    ["../../../etc/passwd", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/etc/passwd", "..%00", "%ff%fe", "a%0d%0aX-Evil:1", "."],
)
def test_a_path_of_a_request_leads_nowhere_but_to_objects(served: Served, path: str) -> None:
    for route in ("similar", "objects", "thumbs"):
        answer = served.get(f"/{route}/{path}")
        assert (answer.status, "x-evil" in answer.headers, b"root:" in answer.body) == (404, False, False)


def test_beyond_loopback_there_must_be_a_token(ruiji: Ruiji, tmp_path: Path) -> None:
    ruiji.media.mkdir()
    said = only_line(ruiji("serve", "--host", "0.0.0.0", code=2).stderr)
    assert "--web-token-file (RUIJI_WEB_TOKEN_FILE)" in said and "TLS" in said
    short = tmp_path / "short"
    short.write_text("hunter2")
    for file, why in ((short, "at least 16"), (tmp_path / "none", "No such file")):
        said = only_line(ruiji("serve", "--web-token-file", str(file), code=2).stderr)
        assert why in said and "hunter2" not in said


def test_a_port_that_is_taken_is_one_line(served: Served, ruiji: Ruiji) -> None:
    ruiji.media.mkdir()
    said = only_line(ruiji("serve", "--port", str(served.port), code=2).stderr)
    assert "Address already in use" in said and "--port" in said


@pytest.fixture
def guarded(ruiji: Ruiji, tmp_path: Path, serve: Callable[..., Served]) -> Served:
    """A service with a token, on all addresses of the machine."""
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    return serve("--host", "0.0.0.0", "--web-token-file", str(file), "--web-name", "Gallery.lan")


def test_with_a_token_nothing_is_told_without_it(guarded: Served) -> None:
    for path in ("/healthz", "/similar/x", "/thumbs/x", "/metrics", "/openapi.json", "/nowhere"):
        for sent in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}, {"Cookie": "a=b"}):
            answer = guarded.get(path, **sent)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert guarded.get(path, Authorization=f"Bearer {TOKEN}").status != 401
    assert guarded.get("/healthz", Host="gallery.lan:8000", Authorization=f"Bearer {TOKEN}").status == 200
    assert guarded.get("/healthz", Host="other.lan", Authorization=f"Bearer {TOKEN}").status == 421
    # The form leads on to what was asked for.
    asked = {"/": "", "/?id=%ff&where=a%3Db": "?to=%2F%3Fid%3D%25ff%26where%3Da%253Db", "//a": "?to=%2F%2Fa"}
    for page, to in asked.items():
        assert guarded.get(page, Accept="text/html,*/*").headers["location"] == f"/login{to}"
    assert guarded.get("/").status == 401
    assert guarded.get(f"/healthz?token={TOKEN}").status == 401
    assert TOKEN not in guarded.log.read_text()


def test_the_form_exchanges_the_token_for_a_session(guarded: Served) -> None:
    assert b"<form" in guarded.get("/login").body
    own = {"Content_Type": "application/json", "Origin": guarded.origin}
    assert guarded.ask("POST", "/login", b'{"token": "wrong"}', **own).status == 403
    assert guarded.ask("POST", "/login", f'{{"token": "{TOKEN}"}}'.encode(), **{**own, "Origin": "null"}).status == 403
    answer = guarded.ask("POST", "/login", f'{{"token": "{TOKEN}"}}'.encode(), **own)
    assert answer.status == 204
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict"} <= set(re.split("; ", cookie)) and "Secure" not in cookie
    assert TOKEN not in cookie
    session = cookie.partition(";")[0]
    assert guarded.get("/healthz", Cookie=session).status == 200
    assert guarded.get("/healthz", Cookie=session[:-1] + "x").status == 401
    name, _, value = session.partition("=")
    later = str(int(value.partition(".")[0]) + 1)
    assert guarded.get("/healthz", Cookie=f"{name}={later}.{value.partition('.')[2]}").status == 401
    # Behind TLS the browser says so by its origin.
    tls = {**own, "Origin": f"https://127.0.0.1:{guarded.port}"}
    secure = guarded.ask("POST", "/login", f'{{"token": "{TOKEN}"}}'.encode(), **tls).headers["set-cookie"]
    assert "Secure" in secure
    left = guarded.ask("POST", "/logout", b"{}", Cookie=session, **own)
    assert left.status == 204 and "Max-Age=0" in left.headers["set-cookie"]


def test_a_session_ends(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    access = access_for("127.0.0.1", (), file)
    session = access.session(1000)
    assert access.is_session(session, 1000 + 12 * 3600 - 1) and not access.is_session(session, 1000 + 12 * 3600)
    file.write_text(TOKEN + "x")
    assert not access_for("127.0.0.1", (), file).is_session(session, 1000)


def test_the_token_counts_on_loopback_too(ruiji: Ruiji, tmp_path: Path, serve: Callable[..., Served]) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    ruiji.environment["RUIJI_WEB_TOKEN_FILE"] = str(file)
    served = start(ruiji)
    assert served.get("/healthz").status == 401
    assert served.get("/healthz", Authorization=f"Bearer {TOKEN}").status == 200
