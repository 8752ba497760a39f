"""Read the zip around a checkpoint, and refuse one that another reader could read differently.

A zip lists its contents twice: before each member, and in the directory at its end (PKWARE's APPNOTE.TXT, 4.3 and 4.4).
Readers differ in which they believe, in which of two members of the same name they take, and in what they do with bytes
in between. So a file in which these do not agree to the byte is refused.
"""

import struct
import zlib
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hf_llama3.errors import UserError, quoted, shown
from hf_llama3.files.reading import what_became_of

END = struct.Struct("<4s4H2LH")
WIDE_END = struct.Struct("<4sQ2H2L4Q")
WIDE_LOCATOR = struct.Struct("<4sLQL")
CENTRAL_HEADER = struct.Struct("<4s6H3L5H2L")
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
MAX_16, MAX_32 = 0xFFFF, 0xFFFFFFFF  # sizes from here on are in a zip's 64-bit fields
SIZES_AFTER, UTF8 = 0x8, 0x800  # flags: sizes are repeated after a member's bytes; names are UTF-8
STORED, DEFLATED = 0, 8
IS_FOLDER = 0x10  # attribute: torch's reader takes nothing out of such a member, and says that all went well
MAX_DIRECTORY_BYTES = 8 * 2**20  # eighty thousand members
MAX_INFLATED_BYTES = 2**20  # torch.save compresses nothing


class Member(NamedTuple):
    name: str
    method: int  # STORED or DEFLATED
    size: int  # bytes of its content
    packed: int  # bytes in the file
    checksum: int  # CRC-32; 0 if it was not computed
    start: int  # offset of its bytes in the file


class Damaged(ValueError):
    """The file contradicts its format, and how."""


def read_members(file: BinaryIO, path: Path, size: int) -> dict[str, Member]:
    """List the members of a zip by name.

    Raises:
        UserError: it is no zip, or could be read in two ways.
    """
    try:
        return list_members(file, size)
    except (Damaged, struct.error, UnicodeDecodeError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, why) -> UserError:
    reason = what_became_of(path) or f" ({shown(why)}); download it again"
    return UserError(f"{path} is not a readable PyTorch checkpoint{reason}")


def list_members(file: BinaryIO, size: int) -> dict[str, Member]:
    count, start, length = find_directory(file, size)
    directory, at, spans, members = read_at(file, start, length), 0, [], {}
    for _ in range(count):
        member, flags, header, at = read_entry(directory, at)
        if member.name in members:
            raise Damaged(f"it holds {quoted(member.name)} twice")
        data = check_local_header(file, member, flags, header, start)
        members[member.name] = member._replace(start=data)
        spans.append((header, data + member.packed, member.name))
    if at != length:
        raise Damaged(f"its directory must have {at} bytes for {count} members, got {length}")
    reached = 0
    for begin, end, name in sorted(spans):
        if begin < reached:
            raise Damaged(f"{quoted(name)} lies in another member's place")
        reached = end
    return members


def find_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Return the number of members, and the offset and size of the directory."""
    if size < END.size:
        raise Damaged("it is no zip file")
    end = size - END.size
    signature, disk, first_disk, here, count, length, start, comment = END.unpack(read_at(file, end, END.size))
    if signature != b"PK\x05\x06" or comment:
        raise Damaged("it does not end as a zip file does")
    if disk or first_disk:
        raise Damaged(f"it is divided among several disks, of which this is {disk}")
    narrow = (here, count, length, start)
    if end >= WIDE_LOCATOR.size:
        at = end - WIDE_LOCATOR.size
        locator, on_disk, wide, disks = WIDE_LOCATOR.unpack(read_at(file, at, WIDE_LOCATOR.size))
        if locator == b"PK\x06\x07":
            if wide + WIDE_END.size != at or on_disk or disks != 1:
                raise Damaged("its end is not where it says")
            end = wide
            signature, record, _, _, disk, first_disk, here, count, length, start = WIDE_END.unpack(
                read_at(file, wide, WIDE_END.size)
            )
            limits = (MAX_16, MAX_16, MAX_32, MAX_32)
            agree = all(
                one in (other, most)
                for one, other, most in zip(narrow, (here, count, length, start), limits, strict=True)
            )
            if signature != b"PK\x06\x06" or record != WIDE_END.size - 12 or not agree:
                raise Damaged("its two ends contradict each other")
    if disk or first_disk or here != count or start + length != end:
        raise Damaged("its directory is not where it says")
    if length > MAX_DIRECTORY_BYTES:
        raise Damaged(f"its directory must have at most {MAX_DIRECTORY_BYTES} bytes, got {length}")
    return count, start, length


def read_entry(directory: bytes, at: int) -> tuple[Member, int, int, int]:
    """Read an entry of the directory; return the member, its flags, and the offsets of its header and of the next."""
    fields = CENTRAL_HEADER.unpack_from(directory, at)
    signature, _, _, flags, method, _, _, checksum, packed, size, name_length, extra_length, comment_length = fields[
        :13
    ]
    if signature != b"PK\x01\x02":
        raise Damaged("an entry of its directory is none")
    at += CENTRAL_HEADER.size
    name = read_name(directory[at : at + name_length])
    extra = directory[at + name_length : at + name_length + extra_length]
    size, packed, header = widen(extra, size, packed, fields[-1])
    disk, _, attributes = fields[13:16]
    if disk or attributes & IS_FOLDER:
        raise Damaged(f"{quoted(name)} lies on another disk, or is a folder")
    if flags & ~(SIZES_AFTER | UTF8):
        raise Damaged(f"{quoted(name)} is encrypted or of another kind, flags {flags:#x}")
    if method not in (STORED, DEFLATED) or (method == STORED and size != packed):
        raise Damaged(f"{quoted(name)} has {size} bytes in {packed} by the method {method}")
    end = at + name_length + extra_length + comment_length
    return Member(name, method, size, packed, checksum, 0), flags, header, end


def read_name(encoded: bytes) -> str:
    name = encoded.decode()
    if "\0" in name or not name:
        raise Damaged(f"a member is called {quoted(name)}")
    return name


def widen(extra: bytes, *numbers: int) -> list[int]:
    """Return the numbers of a header, taking those that do not fit from its 64-bit field."""
    wide, at = None, 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if at + 4 + length > len(extra) or (kind == 1 and wide is not None):
            raise Damaged("an extra field is too long, or stands twice")
        wide = extra[at + 4 : at + 4 + length] if kind == 1 else wide
        at += 4 + length
    found, at = [], 0
    for number in numbers:
        if number == MAX_32 and wide is not None:
            (number,) = struct.unpack_from("<Q", wide, at)
            at += 8
        found.append(number)
    return found


def check_local_header(file: BinaryIO, member: Member, flags: int, header: int, end: int) -> int:
    """Return the offset of a member's bytes, and check its local header against the directory."""
    if header + LOCAL_HEADER.size > end:
        raise Damaged(f"{quoted(member.name)} begins beyond the file")
    fields = LOCAL_HEADER.unpack(read_at(file, header, LOCAL_HEADER.size))
    signature, _, local_flags, method, _, _, _, packed, size, name_length, extra_length = fields
    if signature != b"PK\x03\x04":
        raise Damaged(f"{quoted(member.name)} has no header of its own")
    start = header + LOCAL_HEADER.size + name_length + extra_length
    if start + member.packed > end:
        raise Damaged(f"{quoted(member.name)} reaches beyond the file's members")
    rest = read_at(file, header + LOCAL_HEADER.size, name_length + extra_length)
    size, packed = widen(rest[name_length:], size, packed)
    open_sizes = (size, packed) == (0, 0) and flags & SIZES_AFTER
    same = (read_name(rest[:name_length]), method, local_flags) == (member.name, member.method, flags)
    if not same or not (open_sizes or (size, packed) == (member.size, member.packed)):
        raise Damaged(f"the header of {quoted(member.name)} contradicts the directory")
    return start


def read_member(file: BinaryIO, path: Path, member: Member, limit: int) -> bytes:
    """Return the content of a small member.

    Raises:
        UserError: it is larger than `limit`, or damaged.
    """
    limit = limit if member.method == STORED else min(limit, MAX_INFLATED_BYTES)
    if max(member.size, member.packed) > limit:
        raise UserError(f"{shown(member.name)} in {path} must be at most {limit} bytes, got {member.size}")
    try:
        content = read_at(file, member.start, member.packed)
        if member.method == DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, limit + 1)
        if len(content) != member.size or member.checksum not in (0, zlib.crc32(content)):
            raise Damaged(f"{quoted(member.name)} is not what it was")
    except (Damaged, zlib.error) as error:
        raise unreadable(path, error) from error
    return content


def read_at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    content = file.read(count)
    if len(content) != count:
        raise Damaged(f"it ends within what should be at byte {offset}")
    return content
