"""What a bench is: its limits, the little that its driver must offer, and any bench behind a TCP connection.

A bench is a set of tiles of rows x columns cells. It takes whole-number cell levels and input codes and returns counts:

    count[b, j] = counts_per_unit sum_i code[b, i] level[i, j]  + its own errors

A message to a bench behind TCP is a 4-byte big-endian length, that many bytes of JSON, and the bytes of at most one
array that the JSON's "dtype" and "shape" describe. Requests carry a number that the answer repeats; lengths, types and
times are bounded on both sides. There is no authentication: use it on loopback or a bench's private network only.
"""

import json
import math
import socket
import socketserver
import struct
import threading
import time
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Annotated, Any, Protocol

import numpy as np

from hq_lib.crossbar.checks import OPTION, POSITIVE, Bound, Count, CrossbarError, Positive, Settings

MAX_BYTES = 64 << 20
"""Of a message's head, and of its array."""
_IDLE_S = 60.0
_DTYPES = ("<i8", "<f8")


@dataclass(frozen=True)
class Limits(Settings):
    """What a bench can take and give."""

    n_tiles: Count
    """Tiles, >= 1."""
    rows: Count
    """Rows of a tile."""
    columns: Count
    """Columns of a tile."""
    level_max: Count
    """Largest cell level; levels are 0..level_max."""
    code_max: Count
    """Largest input code; codes are 0..code_max."""
    count_max: Count
    """Largest count; counts are count_min..count_max."""
    rows_per_read: Count
    """Input vectors per read, >= 1."""
    counts_per_unit: Positive
    """Nominal counts per code times level, > 0."""
    count_min: Annotated[int, Bound("<= 0", whole=True)] | None = field(default=None, metadata=OPTION)
    """Smallest count, 0 of a converter that has no sign; None: -count_max."""
    identity: str = field(default="", metadata=OPTION)
    """Which array this is, a serial number: a record is gone on with by no other. "": the bench does not say."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.identity, str):
            raise CrossbarError(f"Limits.identity = {self.identity!r:.60} must be a text, as a serial number")

    @property
    def counts(self) -> tuple[int, int]:
        """(smallest, largest) count."""
        return -self.count_max if self.count_min is None else self.count_min, self.count_max

    def refuse(self, tile: int, values: np.ndarray, what: str) -> None:
        """Nothing, or an error if ``tile`` or its ``values``, "levels" or "codes", are beyond the bench."""
        size, largest = (self.rows, self.columns), self.level_max
        if what == "codes":
            size, largest = (self.rows_per_read, self.rows), self.code_max
        if not 0 <= tile < self.n_tiles:
            raise CrossbarError(f"tile {tile} does not exist; the bench has {self.n_tiles}")
        if values.ndim != 2 or values.shape[0] > size[0] or values.shape[1] > size[1]:
            raise CrossbarError(f"{what} of {values.shape} are larger than the bench's {size[0]} x {size[1]}")
        if not np.issubdtype(values.dtype, np.integer):
            raise CrossbarError(f"{what} must be integers, not {values.dtype}")
        if values.size and (values.min() < 0 or values.max() > largest):
            raise CrossbarError(f"{what} span {values.min()}..{values.max()}, the bench takes 0..{largest}")


class Driver(Protocol):
    """A bench. Every call returns or raises within the driver's own time limit: ``TimeoutError`` and
    ``ConnectionError`` (both may be retried), or `CrossbarError` for what the bench refuses."""

    def limits(self) -> Limits:
        """What the bench can take and give."""
        ...

    def write(self, tile: int, levels: np.ndarray) -> None:
        """Programs ``levels`` (rows, columns) integers into ``tile``; repeating it does no harm."""
        ...

    def read(self, tile: int, codes: np.ndarray) -> np.ndarray:
        """(B, columns) counts of ``tile`` for input ``codes`` (B, rows)."""
        ...

    def environment(self) -> dict[str, float]:
        """Present conditions: "time_s" since programming, "temperature_C", and whatever else the bench knows."""
        ...

    def close(self) -> None:
        """Gives the bench back."""
        ...


class TcpDriver:
    """A bench at ``host``:``port``; follows `Driver`. After a failed call the next one opens a new connection.

    Args:
        host, port: where the bench server listens.
        timeout_s: bound on every call, connecting included, seconds.
    """

    def __init__(self, host: str, port: int, *, timeout_s: float = 5.0) -> None:
        self._address, self._timeout_s = (host, port), POSITIVE.check(timeout_s, "timeout_s")
        self._socket: socket.socket | None = None
        self._number = 0

    def limits(self) -> Limits:
        found = self._call("limits")[0].get("limits")
        needed = {each.name for each in fields(Limits) if each.default is MISSING}
        if not isinstance(found, dict) or not needed <= set(found) <= {each.name for each in fields(Limits)}:
            raise ConnectionError(f"the bench did not answer with its limits but with {found!r:.80}")
        return Limits(**found)

    def write(self, tile: int, levels: np.ndarray) -> None:
        self._call("write", levels, tile=int(tile))

    def read(self, tile: int, codes: np.ndarray) -> np.ndarray:
        counts = self._call("read", codes, tile=int(tile))[1]
        if counts is None:
            raise ConnectionError("the bench answered a read without counts")
        return counts

    def environment(self) -> dict[str, float]:
        found = self._call("environment")[0].get("environment")
        if not isinstance(found, dict) or not all(
            isinstance(value, int | float) and math.isfinite(value) for value in found.values()
        ):
            raise ConnectionError(f"the bench did not answer with its conditions but with {found!r:.80}")
        return {str(key): float(value) for key, value in found.items()}

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _call(
        self, operation: str, array: np.ndarray | None = None, **more: Any
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        self._number += 1
        deadline = time.monotonic() + self._timeout_s
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._address, timeout=self._timeout_s)
            _send(self._socket, {"op": operation, "number": self._number} | more, array, deadline)
            answer, found = _receive(self._socket, deadline)
            if answer.get("number") != self._number:
                raise ConnectionError(f"the bench answered request {answer.get('number')}, not {self._number}")
        except (OSError, ValueError, KeyError) as error:
            self.close()
            if isinstance(error, (TimeoutError, ConnectionError)):
                raise
            raise ConnectionError(f"bench at {self._address[0]}:{self._address[1]}: {error}") from error
        if "refused" in answer:
            raise CrossbarError(f"the bench refused: {answer['refused']}")
        if "failed" in answer:
            raise ConnectionError(f"the bench failed: {answer['failed']}")
        return answer, found


class BenchServer(socketserver.ThreadingTCPServer):
    """A driver served on 127.0.0.1 at a free port, in a thread; use it as a context manager.

    Args:
        driver: the bench; calls reach it one at a time. A connection that is silent for a minute is closed.
    """

    daemon_threads = True

    def __init__(self, driver: Driver) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self._driver, self._one_call = driver, threading.Lock()

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) to connect to."""
        host, port = self.server_address[:2]
        return str(host), int(port)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Nothing; answers one client, until it is lost, silent or unreadable: the next one gets a connection of its
        own."""
        with suppress(OSError, ValueError, KeyError):
            while True:
                asked, array = _receive(request, time.monotonic() + _IDLE_S)
                with self._one_call:
                    answer, found = _answer(self._driver, asked, array)
                _send(request, answer | {"number": asked.get("number")}, found, time.monotonic() + _IDLE_S)

    def __enter__(self) -> "BenchServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def _answer(
    driver: Driver, request: dict[str, Any], array: np.ndarray | None
) -> tuple[dict[str, Any], np.ndarray | None]:
    """What the server sends back; the driver's own errors become words, never a broken connection."""
    try:
        tile: Any = request.get("tile")
        match request.get("op"), array, type(tile) is int:
            case "limits", None, _:
                return {"limits": asdict(driver.limits())}, None
            case "environment", None, _:
                return {"environment": driver.environment()}, None
            case "write", np.ndarray(), True:
                driver.write(tile, array)
                return {}, None
            case "read", np.ndarray(), True:
                return {}, np.asarray(driver.read(tile, array), np.float64)
        return {"refused": f"unknown request {request.get('op')!r:.80} of tile {tile!r:.80}"}, None
    except CrossbarError as error:
        return {"refused": str(error)}, None
    except Exception as error:  # whatever a bench's own code raises: the client must hear of it, and the server go on
        return {"failed": f"{type(error).__name__}: {error}"}, None


def _send(link: socket.socket, head: dict[str, Any], array: np.ndarray | None, deadline: float) -> None:
    body = b""
    if array is not None:
        array = np.ascontiguousarray(array, "<i8" if np.issubdtype(array.dtype, np.integer) else "<f8")
        head, body = head | {"dtype": array.dtype.str, "shape": array.shape}, array.tobytes()
    text = json.dumps(head, default=np.generic.item).encode()
    _limit(link, deadline)
    link.sendall(struct.pack(">I", len(text)) + text + body)


def _receive(link: socket.socket, deadline: float) -> tuple[dict[str, Any], np.ndarray | None]:
    try:
        head = json.loads(_bytes(link, struct.unpack(">I", _bytes(link, 4, deadline))[0], deadline))
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(head, dict):
        raise ValueError(f"a message begins with a JSON object, not with {head!r:.80}")
    if "shape" not in head:
        return head, None
    shape = head["shape"]
    sized = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n >= 0 for n in shape)
    if head.get("dtype") not in _DTYPES or not sized:
        raise ValueError(f"an array of {head.get('dtype')!r:.80} {shape!r:.80} is not accepted")
    data = _bytes(link, 8 * math.prod(shape), deadline)
    return head, np.frombuffer(data, head["dtype"]).reshape(shape)


def _bytes(link: socket.socket, n_bytes: int, deadline: float) -> bytes:
    """Exactly ``n_bytes`` before ``deadline``; longer messages than 64 MiB are refused."""
    if n_bytes > MAX_BYTES:
        raise ValueError(f"a message of {n_bytes} bytes is longer than {MAX_BYTES}")
    data = bytearray()
    while len(data) < n_bytes:
        _limit(link, deadline)
        piece = link.recv(min(n_bytes - len(data), 1 << 20))
        if not piece:
            raise ConnectionError("the other side closed the connection")
        data += piece
    return bytes(data)


def _limit(link: socket.socket, deadline: float) -> None:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the bench did not answer in time")
    link.settimeout(left)
