"""What the job's Java is given, so that nothing of it is open to others."""

from __future__ import annotations

import stat
from pathlib import Path
from zipfile import ZipFile

import pytest

from deploy import flink
from deploy.classfile import ClassFileError, with_body_of
from deploy.processes import STOP_TIMEOUT_S, StackError

DONE_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def servers() -> bytes:
    """Beam's ServerFactory as PyFlink has it."""
    (jar,) = flink.ENVIRONMENT.glob("lib/python3*/site-packages/pyflink/opt/flink-python-*.jar")
    with ZipFile(jar) as file:
        return file.read(flink.SERVERS)


@pytest.mark.budget(30, "a Java and a Python of Flink's own are started")
@pytest.mark.parametrize("name", ["plain", "with a 'blank', and long" + "g" * 120])
def test_beams_servers_are_unix_sockets_whatever_the_folder_is_called(tmp_path, name):
    data = tmp_path / name
    (data / "logs").mkdir(parents=True)
    log = data / "logs" / "stream.log"
    with log.open("ab") as file:
        child = flink.start(data, file, ("tests.deploy.beam_server",))
    try:
        child.wait(DONE_WITHIN_S)
    finally:
        flink.stop(child, STOP_TIMEOUT_S)
    text = log.read_text()
    lines = [line for line in text.splitlines() if "no.such.Service" in line]
    assert len(lines) == 1, text
    url, _, answer = lines[0].partition(" ")
    assert url.startswith(f"unix:///proc/{child.pid}/fd/")
    assert answer == "Method not found: no.such.Service/Method"  # Java's answer, over that socket


def test_what_a_start_has_of_its_own_is_readable_by_its_owner_only(tmp_path):
    path = tmp_path / "keystore.p12"
    flink.write_keystore(path, "password")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert flink.write_classes(tmp_path / "classes") == tmp_path / "classes"


def test_a_method_gets_the_body_of_another_and_the_rest_of_its_class_stays(servers):
    patched = with_body_of(servers, "createDefault", "createEpollDomainSocket")
    assert patched != servers
    assert with_body_of(patched, "createDefault", "createEpollDomainSocket") == patched
    # What was changed is one piece, and shorter: no port is asked for.
    begin = next(at for at, (a, b) in enumerate(zip(servers, patched, strict=False)) if a != b)
    gone = len(servers) - len(patched)
    assert gone > 0
    assert patched[-200:] == servers[-200:]
    assert begin > 200


@pytest.mark.parametrize(
    ("content", "method", "message"),
    [
        (b"", "createDefault", "does not begin as a class file"),
        (b"PK\x03\x04", "createDefault", "does not begin as a class file"),
        (b"\xca\xfe\xba\xbe\0\0\0\x34\0\x05\x63", "createDefault", "unknown kind 99"),
        (b"\xca\xfe\xba\xbe\0\0\0\x34\0\x05\x01\0", "createDefault", "ends too early"),
        (None, "createNothing", "not two methods of the same kind"),
        (None, "createWithUrlFactory", "not two methods of the same kind"),
    ],
)
def test_a_class_that_is_not_the_expected_one_is_refused(servers, content, method, message):
    with pytest.raises(ClassFileError, match=message):
        with_body_of(servers if content is None else content, method, "createEpollDomainSocket")


def test_another_pyflink_than_was_set_up_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(flink, "ENVIRONMENT", tmp_path)
    with pytest.raises(StackError, match="`make setup` puts it there"):
        flink.write_classes(tmp_path / "classes")
    opt = tmp_path / "lib" / "python3.11" / "site-packages" / "pyflink" / "opt"
    opt.mkdir(parents=True)
    jar: Path = opt / "flink-python-9.9.jar"
    jar.write_bytes(b"no jar")
    with pytest.raises(StackError, match="is not what `make setup` put there"):
        flink.write_classes(tmp_path / "classes")
    with ZipFile(jar, "w") as file:
        file.writestr("other.class", b"")
    with pytest.raises(StackError, match="is not what `make setup` put there"):
        flink.write_classes(tmp_path / "classes")


def test_javas_log_is_appended_to(tmp_path):
    flink.write_log_settings(tmp_path)
    text = (tmp_path / "log4j.properties").read_text()
    assert "appender.file.append = true" in text
    assert "appender.file.append = false" not in text
