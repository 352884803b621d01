# %% [markdown]
# # Reading archives that nobody vouches for
#
# > A gzipped tar file as a stream of members: checked to the last byte, and nothing accepted that does not belong.
#
# `tarfile` was made to restore backups: links, devices, owners and absolute names are features. With a download they
# are the attack. Its filters had bypasses of their own, it keeps a record of every member in memory, and it stops at
# the end mark, before the checksum of the compressed stream is ever compared: one flipped bit in a picture is extracted
# without a word. The archives of this data set hold regular files three levels deep and nothing else, so a reader that
# knows nothing else is shorter, safer, and about a third faster.

# %%
#| default_exp embryo.members

# %%
#| export
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from isal import isal_zlib

from medvol_nb.core import DataError, human_bytes
from medvol_nb.embryo.phases import ANNOTATIONS, TIMES

# %%
import gzip
import io

from medvol_nb.core import raises
from medvol_nb.embryo.phantom import bad_members, pack

# %% [markdown]
# ## What can go wrong, by name

# %%
#| export
class ExtractionError(DataError):
    "The archives cannot be extracted; nothing was left at the target"
class BadArchive(ExtractionError):
    "A file is not the archive it is called, or is damaged"
class UnsafeMember(ExtractionError):
    "An archive holds a member that must not be written"

# %% [markdown]
# ## The stream
# A compressed file is read and inflated in blocks of at most a mebibyte, so that a bomb cannot take the memory. `take`
# hands out the next bytes, as a view where it can. At its end the decompressor has compared length and checksum.

# %%
#| export
_BLOCK, _INFLATED = 2**20, 2**20

class GzipStream:
    "Bytes inside a gzip file, in order; counts what went in and out"
    def __init__(
        self,
        file: BinaryIO, # open file
        name: str, # used in errors
        limit: float = float("inf"), # refuse to inflate to more [byte]
    ):
        self.file, self.name, self.limit = file, name, limit
        self.read = self.inflated = 0
        self._zlib, self._rest = isal_zlib.decompressobj(31), b""
        self._now, self._at, self._ended = memoryview(b""), 0, False

    def _more(self) -> bool:
        "Inflate another block; False at the end of the last gzip member"
        while True:
            if not self._rest and not self._zlib.eof and not self._zlib.unconsumed_tail:
                self._rest = self.file.read(_BLOCK)
                self.read += len(self._rest)
                if not self._rest: raise BadArchive(f"{self.name} is truncated: it ends in the middle, after "
                                                    f"{self.read} bytes. Download it again")
            if self._zlib.eof:
                self._rest = self._zlib.unused_data.lstrip(b"\0") or self._next_block()
                if not self._rest: return False
                if len(self._rest) < 2: self._rest += self.file.read(_BLOCK)
                if self._rest[:2] != b"\x1f\x8b":
                    raise BadArchive(f"{self.name} is damaged: something else follows its end, near byte {self.read}")
                self._zlib = isal_zlib.decompressobj(31)
            data, self._rest = self._zlib.unconsumed_tail or self._rest, b""
            try: out = self._zlib.decompress(data, _INFLATED)
            except isal_zlib.error as e:
                raise BadArchive(f"{self.name} is damaged near byte {self.read} ({e}). Download it again") from None
            if not out: continue
            self.inflated += len(out)
            if self.inflated > self.limit:
                raise UnsafeMember(f"{self.name} inflates to more than {human_bytes(self.limit)}, which no archive of "
                                   "pictures does")
            self._now, self._at = memoryview(out), 0
            return True

    def _next_block(self) -> bytes:
        "The first bytes after a gzip member that are not padding"
        while data := self.file.read(_BLOCK):
            self.read += len(data)
            if data := data.lstrip(b"\0"): return data
        return b""

    def take(
        self,
        n: int, # how many
    ) -> memoryview | bytes: # (n,) bytes
        "The next `n` bytes; fewer only at the end"
        end = self._at + n
        if end <= len(self._now):
            self._at, view = end, self._now[self._at:end]
            return view
        parts, lack = [bytes(self._now[self._at:])], end - len(self._now)
        while lack > 0 and self._more():
            parts.append(bytes(self._now[:lack]))
            self._at = len(parts[-1])
            lack -= len(parts[-1])
        if lack > 0: self._now, self._at = memoryview(b""), 0
        return b"".join(parts)

# %% [markdown]
# ## Members
# A tar header is 512 bytes of text fields. Only what these archives need is understood: regular files, folders, and the
# two ways to spell a long name. The checksum of the header is compared first; `adler32` sums bytes at the speed of C,
# exactly for up to 257 of them.

# %%
#| export
class Member(NamedTuple):
    "One file or folder of an archive"
    name: str # as stored, without a leading './' and a final '/'
    is_folder: bool # a folder
    size: int # [byte]

_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a character device", b"4": "a block device",
          b"6": "a FIFO", b"7": "a contiguous file", b"S": "a sparse file", b"V": "a volume label",
          b"M": "a part of another volume", b"D": "a GNU folder dump", b"K": "a long link name"}
_MAX_HEADER = 2**16

def _number(text: bytes, where: str) -> int:
    if text[:1] and text[0] & 0x80: raise UnsafeMember(f"{where} declares a size of 8 GiB or more")
    digits = bytes(text).strip(b" \0") or b"0"
    if not re.fullmatch(rb"[0-7]+", digits): # no sign: a stream that went backwards would never end
        raise BadArchive(f"{where} has a damaged header: {bytes(text)!r} is not a number")
    return int(digits, 8)

def _text(raw: bytes, where: str) -> str:
    try: return raw.decode()
    except UnicodeDecodeError: raise UnsafeMember(f"{where} has a name that is not UTF-8: {raw[:80]!r}") from None

def _pax(data: bytes, where: str) -> dict[str, str]:
    "Records of an extended header"
    out = {}
    while data.strip(b"\0"):
        m = re.match(rb"(\d{1,5}) ", data)
        record = data[len(m[0]):int(m[1])] if m else b""
        if not m or int(m[1]) > len(data) or not record.endswith(b"\n") or b"=" not in record:
            raise BadArchive(f"{where} has a damaged extended header")
        key, value = record[:-1].split(b"=", 1)
        out[_text(key, where)], data = _text(value, where), data[int(m[1]):]
    return out

def read_members(
    stream: GzipStream, # at the begin of the archive
) -> Iterator[Member]: # with the stream at the begin of its content
    "Members in order; the caller takes the content of each from the stream before it asks for the next"
    long_name, count = "", 0
    while True:
        head = bytes(stream.take(512))
        where = f"{stream.name}, member {count + 1}"
        if len(head) < 512: raise BadArchive(f"{stream.name} ends after {count} members without the mark of its end")
        if not head.strip(b"\0"): return
        total = (zlib.adler32(head[:256]) & 0xffff) + (zlib.adler32(head[256:]) & 0xffff) - 2 # sum of all bytes
        if _number(head[148:156], where) != total - sum(head[148:156]) + 8*32:
            raise BadArchive(f"{where} has a damaged header (checksum)")
        kind, size = head[156:157], _number(head[124:136], where)
        if kind in (b"L", b"x", b"g"):
            if size > _MAX_HEADER: raise UnsafeMember(f"{where} has an extended header of {size} bytes")
            data = bytes(stream.take(size + -size % 512))[:size]
            if kind == b"L": long_name = _text(data.rstrip(b"\0"), where)
            elif kind == b"x":
                records = _pax(data, where)
                if odd := sorted(k for k in records if k in ("size", "linkpath") or k.startswith("GNU.sparse")):
                    raise UnsafeMember(f"{where} redefines {', '.join(odd)} in an extended header")
                long_name = records.get("path", long_name)
            continue
        prefix = head[345:500].split(b"\0")[0] if head[257:263] == b"ustar\0" else b""
        raw = head[:100].split(b"\0")[0]
        name, long_name = long_name or _text(prefix + b"/"*bool(prefix) + raw, where), ""
        if kind not in (b"0", b"\0", b"5"):
            raise UnsafeMember(f"{stream.name}: member {name[:200]!r} is {_KINDS.get(kind, f'of kind {kind!r}')}, only "
                               "files and folders are extracted")
        is_folder = kind == b"5" or name.endswith("/")
        if is_folder and size: raise UnsafeMember(f"{stream.name}: folder {name[:200]!r} declares content")
        count += 1
        yield Member(name.removeprefix("./").removesuffix("/"), is_folder, size)

# %% [markdown]
# The policy says which names may exist at all: `<archive>/<video>/<file>`, `<archive>/<video>/F0/<file>`, and for the
# two table archives `<archive>/<file>.csv`. There is no need to guess what a strange name would do on some system.

# %%
#| export
MAX_MEMBER = 16*2**20
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

def check_member(
    member: Member, # from the archive
    stem: str, # name of the archive without .tar.gz, which is the name of its folder
    max_member_bytes: int = MAX_MEMBER, # larger files are refused [byte]
) -> tuple[str, ...]: # parts of the name below the archive's folder
    "Refuse whatever does not belong into such an archive"
    def refuse(why: str) -> None: raise UnsafeMember(f"{stem}.tar.gz: member {member.name[:200]!r} {why}")
    parts = member.name.split("/")
    if member.name.startswith("/"): refuse("is absolute")
    if ".." in parts: refuse("holds '..'")
    if "\\" in member.name: refuse("holds a backslash")
    if _CONTROL.search(member.name): refuse("holds control characters")
    if "" in parts or "." in parts: refuse("has an empty part in its name")
    if len(member.name) > 60 and any(len(p.encode()) > 255 for p in parts): refuse("has a name of more than 255 bytes")
    if member.size > max_member_bytes: refuse(f"declares {human_bytes(member.size)}, at most "
                                              f"{human_bytes(max_member_bytes)} are allowed")
    if parts[0] != stem: refuse(f"lies outside of the folder {stem!r}")
    below = tuple(parts[1:])
    if stem in (ANNOTATIONS, TIMES): fits = not below if member.is_folder else len(below) == 1 and \
        below[0].endswith(".csv")
    elif member.is_folder: fits = len(below) < 2 or (len(below) == 2 and below[1] == "F0")
    else: fits = (len(below) == 2 and below[1] != "F0") or (len(below) == 3 and below[1] == "F0")
    if not fits: refuse("is not where this data set has " + ("folders" if member.is_folder else "files"))
    return below

# %%
def names_in(archive, stem="embryo_dataset"):
    stream, found = GzipStream(io.BytesIO(archive), "x.tar.gz"), []
    for m in read_members(stream):
        found.append("/".join(check_member(m, stem)))
        stream.take(m.size + -m.size % 512)
    while stream.take(2**20): pass
    return found

refused = []
for what, members in bad_members("embryo_dataset").items():
    try: names_in(pack({"embryo_dataset/AA83-7/aRUN1.jpeg": b"x"}, members))
    except UnsafeMember as e: refused.append((what, str(e).split("member ")[-1][:60]))
refused

# %% [markdown]
# What is left are names that are fine one by one and clash on disk; they are refused when they are written, since no
# file is ever opened that exists.

# %%
assert {w for w in bad_members("embryo_dataset")} - {w for w, _ in refused} == \
    {"duplicate", "duplicate with dot"}
assert check_member(Member("embryo_dataset/AA83-7/F0/aRUN1.jpeg", False, 9), "embryo_dataset") == \
    ("AA83-7", "F0", "aRUN1.jpeg")

# %% [markdown]
# Damage is found wherever it is: in the middle, in the checksum, at a cut, or behind the end.

# %%
sound = pack({"embryo_dataset/AA83-7/aRUN1.jpeg": bytes(range(256))*400})
names_in(sound)

# %%
assert names_in(sound) == ["", "AA83-7", "AA83-7/aRUN1.jpeg"] == names_in(sound + bytes(100))
assert names_in(gzip.compress(gzip.decompress(sound)[:3000]) + gzip.compress(gzip.decompress(sound)[3000:])) == \
    names_in(sound)
with raises(BadArchive, match="truncated: it ends in the middle"): names_in(sound[:len(sound)//2])
with raises(BadArchive, match="damaged near byte.*Incorrect checksum"):
    names_in(sound[:-8] + bytes([sound[-8] ^ 1]) + sound[-7:])
with raises(BadArchive, match="something else follows its end"): names_in(sound + b"garbage")
header = bytearray(gzip.decompress(sound))
header[3] ^= 1
with raises(BadArchive, match="member 1 has a damaged header .checksum"): names_in(gzip.compress(bytes(header)))
with raises(UnsafeMember, match="inflates to more than 1.0 MiB"):
    GzipStream(io.BytesIO(gzip.compress(bytes(2**22))), "bomb.tar.gz", 2**20).take(2**22)
