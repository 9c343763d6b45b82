"""A bench behind TCP: as the bench itself, and whatever else the network delivers is an error, never a crash."""

import socket
import struct
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from benches import LIMITS, W, X, engine_on, fake

from hq_lib.crossbar import (
    BenchError,
    BenchServer,
    Drive,
    FakeDriver,
    HardwareEngine,
    Limits,
    Patience,
    TcpDriver,
    bench,
    drivers,
    hardware,
)


def test_over_tcp_as_in_memory():
    with BenchServer(fake()) as server:
        driver = TcpDriver(*server.address)
        assert driver.limits() == Limits(**LIMITS)
        with engine_on(driver) as engine:
            handle = engine.load(W, 1.0, "a")
            np.testing.assert_array_equal(engine.mvm(handle, X), X @ W)
            assert engine.time_s >= 0
            assert engine.describe()["env.temperature_C"] == 25.0


def test_a_bench_failure_crosses_tcp_and_is_retried():
    with BenchServer(fake(["timeout", "drop"])) as server, engine_on(TcpDriver(*server.address)) as engine:
        np.testing.assert_array_equal(engine.mvm(engine.load(W, 1.0, "a"), X), X @ W)


def message(text: bytes, body: bytes = b"") -> bytes:
    """What goes over the wire: length, JSON, the bytes of an array."""
    return struct.pack(">I", len(text)) + text + body


class Deaf:
    """A loopback server that accepts and then says ``words``, or nothing."""

    def __init__(self, words: bytes = b"") -> None:
        self._listener, self._links, self._words = socket.create_server(("127.0.0.1", 0)), [], words
        self.address = self._listener.getsockname()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            self._links.append(link)
            link.sendall(self._words)

    def close(self) -> None:
        for link in (*self._links, self._listener):
            link.close()


def test_a_silent_bench_times_out_within_its_limit():
    server = Deaf()
    driver, start = TcpDriver(*server.address, timeout_s=0.2), time.monotonic()
    with pytest.raises(TimeoutError):
        driver.limits()
    assert time.monotonic() - start < 5
    with pytest.raises(BenchError, match="limits failed 2 times"):
        HardwareEngine(driver, patience=Patience(2, 0.0))
    server.close()


@pytest.mark.parametrize(
    "words",
    [
        b"\xff\xff\xff\xff",
        struct.pack(">I", 3) + b"{{{",
        struct.pack(">I", 13) + b'{"number": 9}',
        struct.pack(">I", 55) + b'{"number": 1, "dtype": "|O", "shape": [100000, 100000]}',
        message(b"[1]"),
        message(b"null"),
        message(b"[" * 100_000),
        message(b'{"number": 1, "dtype": "<f8", "shape": null}'),
        message(b'{"number": 1, "dtype": "<f8", "shape": [1e999, 1]}'),
        message(b'{"number": 1}'),
        message(b'{"number": 1, "limits": {"rows": 1}}'),
    ],
    ids=[
        "endless", "no json", "wrong number", "bad type", "a list", "null", "too deep", "no shape", "infinite shape",
        "no limits", "other limits",
    ],
)  # fmt: skip
def test_nonsense_from_the_network_is_a_lost_connection(words):
    server = Deaf(words)
    driver = TcpDriver(*server.address, timeout_s=1.0)
    with pytest.raises(ConnectionError):
        driver.limits()
    driver.close()
    server.close()


def test_a_read_is_cut_to_what_a_message_holds(monkeypatch):
    """64 MiB are 65,536 rows of 128 codes: here 4 KiB stand for them, 4 rows; a bench that takes more gets no more."""
    sizes = []

    class Counting(FakeDriver):
        def read(self, tile, codes):
            sizes.append(codes.nbytes)
            return super().read(tile, codes)

    for module in (drivers, hardware):
        monkeypatch.setattr(module, "MAX_BYTES", 4096)
    limits = replace(bench.REHEARSAL, rows_per_read=100_000, counts_per_unit=1.0)
    with BenchServer(Counting(limits)) as server:
        engine = engine_on(TcpDriver(*server.address), mapping=None, drive=Drive())
        np.testing.assert_array_equal(engine.mvm(engine.load(W, 1.0, "a"), X), X @ W)
        engine.close()
    assert sizes == [8 * 20 * 4, 8 * 20 * 4, 8 * 20 * 2]


def test_conditions_that_are_no_numbers_are_refused_where_they_are_asked_for():
    class Timeless(FakeDriver):
        def environment(self):
            return {"time_s": float("nan")}

    with BenchServer(Timeless(Limits(**LIMITS))) as server:
        driver = TcpDriver(*server.address)
        with pytest.raises(ConnectionError, match="nan"):
            driver.environment()
        driver.close()


def test_limits_and_conditions_may_be_numbers_of_numpy():
    class Measuring(FakeDriver):
        def environment(self):
            return {"time_s": np.float32(2.5), "n_reads": np.int64(3)}

    with BenchServer(Measuring(Limits(**(LIMITS | {"rows": np.int64(16)})))) as server:
        driver = TcpDriver(*server.address)
        assert (driver.limits().rows, driver.environment()) == (16, {"time_s": 2.5, "n_reads": 3.0})
        driver.close()


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    with pytest.raises(ConnectionError):
        TcpDriver(*address, timeout_s=0.5).limits()


def test_the_server_survives_rubbish_and_serves_the_next_client():
    with BenchServer(fake()) as server:
        with socket.create_connection(server.address) as link:
            link.sendall(b"\xff\xff\xff\xffGET / HTTP/1.0\r\n\r\n")
        driver = TcpDriver(*server.address)
        assert driver.limits().rows == 16
        driver.close()


@pytest.mark.parametrize(
    "request_",
    [
        message(b"[1]"),
        message(b'{"op": "read", "tile": 0, "shape": null}'),
        message(b'{"op": "read", "tile": "x", "shape": [1, 16], "dtype": "<i8"}', bytes(128)),
        message(b'{"op": "read", "shape": [1, 16], "dtype": "<i8"}', bytes(128)),
        message(b'{"op": "read", "tile": 3, "shape": [1, 16], "dtype": "<i8"}', bytes(128)),
        message(b"[" * 100_000),
    ],
    ids=["a list", "no shape", "tile x", "no tile", "unwritten tile", "too deep"],
)
def test_the_server_answers_or_hangs_up_and_never_fails(request_, capfd):
    with BenchServer(fake()) as server:
        with socket.create_connection(server.address, timeout=5) as link:
            link.sendall(request_)
            answer = link.recv(1000)
        assert not answer or b"refused" in answer
        driver = TcpDriver(*server.address)
        assert driver.limits().rows == 16
        driver.close()
    assert "Traceback" not in capfd.readouterr().err


def test_whatever_a_bench_s_code_raises_reaches_the_client_as_words():
    class Broken(FakeDriver):
        def read(self, tile, codes):
            raise IndexError("register 7")

    with BenchServer(Broken(Limits(**LIMITS))) as server, engine_on(TcpDriver(*server.address)) as engine:
        handle = engine.load(W, 1.0, "a")
        with pytest.raises(BenchError, match=r"reading tile 0 failed 3 times.*IndexError: register 7"):
            engine.mvm(handle, X)
