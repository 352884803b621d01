# %% [markdown]
# # Stores behind a URL
#
# > Read-only access to chunked stores on servers that stumble: retries with back-off, and no short answer is believed.
#
# A scan of several terabytes is often not on this machine. Chunked stores can be read over the network as they are, a
# file for each chunk, but three things go wrong there. The server is busy and answers 500 once. The connection breaks
# in the middle of a chunk. And an error page comes instead of a file. The reference system takes whatever arrives.
# Here a request is repeated up to five times with growing pauses, an answer shorter than announced counts as failed,
# and what still fails is an error that names the file.
#
# `https` is read with Python's own client, every other protocol ([S3](https://s3fs.readthedocs.io), Google, memory,
# ...) through [fsspec](https://filesystem-spec.readthedocs.io).

# %%
#| default_exp zarrnet.remote

# %%
#| export
import asyncio
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from medvol_nb.core import DataError, log, optional

# %%
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

from medvol_nb import phantoms
from medvol_nb.core import raises, tmpdir
from medvol_nb.geometry import Volume, affine_from
from medvol_nb.stores import write_zarr

# %% [markdown]
# ## Trying again
# Some failures pass by themselves: a busy server, a broken connection, a truncated answer. The pauses double, so five
# retries take about three seconds before we give up. Others never pass, such as a refused permission; they are raised
# at once. A file that does not exist is no failure: a chunk that is not stored holds the fill value.

# %%
#| export
RETRIES, FIRST_PAUSE, TIMEOUT = 5, 0.1, 30.0 # number, [s], [s]

class Passing(Exception):
    "A failure that may pass when the request is repeated"

def with_retries(
    request: Callable[[], Any], # raises `Passing` to be repeated
    where: str, # file or URL, for the message
) -> Any: # what the request returned
    "Repeat a request up to five times, with pauses that double"
    for k in range(RETRIES + 1):
        try: return request()
        except Passing as e:
            if k == RETRIES:
                raise DataError(f"{where}: {e}, {RETRIES + 1} times in a row. Try later, or copy the store to a local "
                                "disk") from None
            log.info("%s: %s, trying again", where, e)
            time.sleep(FIRST_PAUSE*2**k)

# %%
answers = iter([Passing("busy"), Passing("busy"), "data"])
def moody():
    answer = next(answers)
    if isinstance(answer, Exception): raise answer
    return answer
with_retries(moody, "https://example.org/0.0.0")

# %% [markdown]
# ## One file, or a part of it
# A part is asked for as `(start, stop)` in bytes, as in slices: a negative start counts from the end. Sharded stores
# need this, they keep many chunks in one file. A server that knows no ranges sends the whole file, of which the part is
# cut.

# %%
#| export
def _http(url: str, start: int | None, stop: int | None, head: bool = False) -> Any:
    "One request: bytes (or the headers), None if there is no such file"
    headers = {"Accept-Encoding": "identity"}
    if start is not None: headers["Range"] = f"bytes={start}" + ("" if start < 0 else f"-{stop - 1 if stop else ''}")
    try:
        order = urllib.request.Request(url, headers=headers, method="HEAD" if head else "GET")
        with urllib.request.urlopen(order, timeout=TIMEOUT) as answer:
            if head: return dict(answer.headers)
            data = answer.read()
            return data[start:stop] if start is not None and answer.status == 200 else data
    except urllib.error.HTTPError as e:
        if e.code in (404, 410): return None
        if e.code in (408, 425, 429) or e.code >= 500: raise Passing(f"HTTP {e.code} {e.reason}") from None
        raise DataError(f"{url}: HTTP {e.code} {e.reason}") from None
    except (OSError, http.client.HTTPException) as e: raise Passing(f"{type(e).__name__}: {e}") from None

@dataclass(frozen=True)
class Remote:
    "The files below a URL, to be read only"
    url: str # of a folder: 'https://...', 's3://...', 'memory://...'

    @property
    def is_http(self) -> bool: # True: read by Python's own client, which cannot list folders
        "Whether this is a web server"
        return self.url.lower().startswith(("http://", "https://"))

    @cached_property
    def _fs(self) -> tuple[Any, str]:
        try: return optional("fsspec", extra="dask").core.url_to_fs(self.url)
        except (ValueError, ImportError) as e: raise DataError(f"{self.url}: cannot be opened ({e})") from None

    def address(
        self,
        key: str, # file, relative
    ) -> str: # its URL
        "Where a file is, for messages"
        return f"{self.url.rstrip('/')}/{key}".rstrip("/")

    def read(
        self,
        key: str, # file, relative to the URL
        start: int | None = None, # first byte; negative: counted from the end
        stop: int | None = None, # byte after the last; needs a start from 0 on
    ) -> bytes | None: # None if there is no such file
        "Bytes of a file, or of a part of it"
        def request() -> bytes | None:
            data = _http(self.address(key), start, stop) if self.is_http else self._cat(key, start, stop)
            if data is not None and stop is not None and len(data) < stop - start:
                raise Passing(f"got {len(data)} of {stop - start} bytes")
            return data
        return with_retries(request, self.address(key))

    def _ask(self, key: str, request: Callable[[], Any]) -> Any:
        "What fsspec answers, None if there is no such file; what fails for other reasons may pass"
        try: return request()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError): return None
        except PermissionError as e: raise DataError(f"{self.address(key)}: {e}") from None
        except Exception as e: raise Passing(f"{type(e).__name__}: {e}") from None

    def _cat(self, key: str, start: int | None, stop: int | None) -> bytes | None:
        fs, root = self._fs
        return self._ask(key, lambda: fs.cat_file(f"{root.rstrip('/')}/{key}", start=start, end=stop))

    def tag(
        self,
        key: str, # file, relative to the URL
    ) -> str | None: # changes with the content, as far as the server tells; None if there is no such file
        "Entity tag, or size and date, of a file on a web server"
        head = with_retries(lambda: _http(self.address(key), None, None, head=True), self.address(key))
        if head is None: return None
        known = {k.lower(): v for k, v in head.items()}
        return known.get("etag") or f"{known.get('content-length')} {known.get('last-modified')}"

    def listing(
        self,
        folder: str = "", # relative to the URL
    ) -> dict[str, str] | None: # file, relative to `folder` -> tag or size and date; None: it cannot be listed
        "All files below a folder"
        if self.is_http: return None
        fs, root = self._fs
        root = f"{root.rstrip('/')}/{folder}".rstrip("/")
        found = with_retries(lambda: self._ask(folder, lambda: fs.find(root, detail=True)), self.address(folder)) or {}
        cut = len(fs._strip_protocol(root)) + 1
        marks = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created")
        return {fs._strip_protocol(k)[cut:]: f"{v.get('size')} {next((v[m] for m in marks if m in v), '')}"
                for k, v in found.items()}

# %% [markdown]
# A small web server for the examples below: it knows no ranges, and it can be told to fail.

# %%
class Moody(SimpleHTTPRequestHandler):
    trouble, asked = [], []
    def log_message(self, *args): pass
    def do_GET(self):
        Moody.asked.append(self.path)
        if not Moody.trouble: return super().do_GET()
        if Moody.trouble.pop(0) == "500": return self.send_error(500)
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"only a few bytes")

def serve(folder):
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Moody, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"

# %%
with tmpdir() as d:
    (d/"0.0.0").write_bytes(b"0123456789")
    server, url = serve(d)
    there = Remote(url)
    Moody.trouble = ["500", "short"]
    results = there.read("0.0.0"), there.read("0.0.0", 2, 4), there.read("0.0.0", -3), there.read("0.0.1")
    FIRST_PAUSE, Moody.trouble = 0.001, ["500"]*9
    with raises(DataError, match="HTTP 500 .* 6 times in a row"): there.read("0.0.0")
    server.shutdown()
    server.server_close()
results

# %%
assert results == (b"0123456789", b"23", b"789", None)

# %% [markdown]
# ## A store for the zarr library
# zarr asks a *store* for keys. This one answers from a `Remote`; the requests for the chunks of one patch run side by
# side in threads. It never lists what it cannot list: a plain web server does not tell which chunks exist.

# %%
#| export
@lru_cache(1)
def _store_class() -> type:
    from zarr.abc.store import OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest

    class RemoteStore(Store):
        "Read-only zarr store over a `Remote`"
        supports_writes = supports_deletes = False

        def __init__(self, remote: Remote):
            super().__init__(read_only=True)
            self.remote = remote

        def __eq__(self, other: object) -> bool: return isinstance(other, RemoteStore) and other.remote == self.remote
        __hash__ = None

        @property
        def supports_listing(self) -> bool: return not self.remote.is_http

        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            start = stop = None
            if isinstance(byte_range, RangeByteRequest): start, stop = byte_range.start, byte_range.end
            elif isinstance(byte_range, OffsetByteRequest): start = byte_range.offset
            elif isinstance(byte_range, SuffixByteRequest): start = -byte_range.suffix
            data = await asyncio.to_thread(self.remote.read, key, start, stop)
            return None if data is None else prototype.buffer.from_bytes(data)

        async def get_partial_values(self, prototype: Any, key_ranges: Any) -> list:
            return list(await asyncio.gather(*(self.get(k, prototype, r) for k, r in key_ranges)))

        async def exists(self, key: str) -> bool:
            return await asyncio.to_thread(self.remote.read, key) is not None

        async def set(self, key: str, value: Any) -> None: raise NotImplementedError("read only")
        async def delete(self, key: str) -> None: raise NotImplementedError("read only")

        async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
            for key in sorted(await asyncio.to_thread(self.remote.listing, prefix.strip("/")) or ()):
                yield f"{prefix.strip('/')}/{key}".lstrip("/")

        async def list(self) -> AsyncIterator[str]:
            async for key in self.list_prefix(""): yield key

        async def list_dir(self, prefix: str) -> AsyncIterator[str]:
            found = await asyncio.to_thread(self.remote.listing, prefix.strip("/")) or ()
            for name in sorted({key.split("/")[0] for key in found}): yield name

    return RemoteStore

def remote_store(
    remote: Remote, # where the store is
) -> Any: # a `zarr.abc.store.Store`
    "A zarr store that reads through `remote`"
    return _store_class()(remote)

# %%
import zarr

roll = phantoms.sheets((32, 48, 48))
with tmpdir() as d:
    write_zarr(Volume(roll.img, affine_from(1.0, axes="zyx"), "zyx"), d/"roll.zarr", chunks=16, shards=(32, 32, 32))
    server, url = serve(d)
    Moody.trouble, Moody.asked = [], []
    array = zarr.open(remote_store(Remote(f"{url}/roll.zarr/image")), mode="r")
    there = array[4:20, 10:40, 3:30]
    asked = len(Moody.asked)
    server.shutdown()
    server.server_close()
asked

# %%
assert np.array_equal(there, roll.img[4:20, 10:40, 3:30])
