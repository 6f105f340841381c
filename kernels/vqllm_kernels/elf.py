"""A relocatable object (ELF, x86-64) as code that can be called: what a linker does, for the few
kinds of sections and relocations that LLVM makes for kernels.

Source: System V Application Binary Interface, AMD64 supplement, chapter 4.
"""

import ctypes
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass

_ALLOC, _NOBITS, _SYMTAB, _RELA = 2, 8, 2, 4
_UNDEFINED, _ABSOLUTE, _COMMON = 0, 0xFFF1, 0xFFF2
_ABS64, _PC64 = 1, 24
_WRITE = 1
_EH_FRAME = b".eh_frame"


@dataclass(frozen=True)
class _Section:
    name: bytes
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int


def load(code: bytes, find: Callable[[str], int]) -> tuple[mmap.mmap, dict[str, int]]:
    """Lay out an object in memory that can be executed and not be written.

    Args:
        code: the object.
        find: the address of a symbol that the object does not define. ValueError if there is none.

    Returns:
        The memory, to be kept as long as the code may be called, and the addresses of its global
        symbols.

    Raises:
        ValueError: anything that is not understood.
        OSError: memory that may be executed is refused.
    """
    try:
        return _load(code, find)
    except (struct.error, IndexError) as error:
        raise ValueError(f"a damaged object: {error}") from error


def _load(code: bytes, find: Callable[[str], int]) -> tuple[mmap.mmap, dict[str, int]]:
    sections = _sections(code)
    places, size = {}, 0
    for i, section in enumerate(sections):
        if section.flags & _ALLOC and section.name != _EH_FRAME:
            if section.flags & _WRITE:
                raise ValueError(f"a section that is written into: {section.name.decode()}")
            size = -(-size // section.align) * section.align
            places[i] = size
            size += section.size
    [table] = [section for section in sections if section.kind == _SYMTAB]
    symbols = _symbols(code, table, sections[table.link])
    commons = {}
    for i, (_, _, index, align, length) in enumerate(symbols):
        if index == _COMMON:
            size = -(-size // align) * align
            commons[i] = size
            size += length
    memory = mmap.mmap(-1, max(size, 1))
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for i, place in places.items():
        section = sections[i]
        if section.kind != _NOBITS:
            memory[place : place + section.size] = _part(code, section)
    addresses, defined = _addresses(symbols, start, places, commons, find)
    for section in sections:
        if section.kind == _RELA and section.info in places:
            _relocate(memory, code, section, places[section.info], start, addresses)
    _protect(start, len(memory))
    return memory, defined


def _sections(code: bytes) -> list[_Section]:
    if code[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<HH", code, 16) != (1, 62):
        raise ValueError("not a relocatable object of x86-64")
    [first] = struct.unpack_from("<Q", code, 40)
    each, number, names = struct.unpack_from("<HHH", code, 58)
    raw = [struct.unpack_from("<IIQQQQIIQQ", code, first + i * each) for i in range(number)]
    base = raw[names][4]
    return [
        _Section(_text(code, base + name), kind, flags, offset, size, link, info, max(align, 1))
        for name, kind, flags, _, offset, size, link, info, align, _ in raw
    ]


def _symbols(
    code: bytes, table: _Section, strings: _Section
) -> list[tuple[str, bool, int, int, int]]:
    """Name, whether it is global, section, value, size of each."""
    every = []
    for at in range(table.offset, table.offset + table.size, 24):
        name, info, _, index, value, size = struct.unpack_from("<IBBHQQ", code, at)
        text = _text(code, strings.offset + name).decode("latin-1")
        every.append((text, info >> 4 != 0, index, value, size))
    return every


def _addresses(
    symbols: list[tuple[str, bool, int, int, int]],
    start: int,
    places: dict[int, int],
    commons: dict[int, int],
    find: Callable[[str], int],
) -> tuple[list[int], dict[str, int]]:
    addresses, defined = [], {}
    for i, (name, is_global, index, value, _) in enumerate(symbols):
        if index == _UNDEFINED:
            address = find(name) if name else 0
        elif index == _COMMON:
            address = start + commons[i]
        elif index in places:
            address = start + places[index] + value
            if is_global:
                defined[name] = address
        else:  # of sections that are not laid out, or names of files
            address = 0
        addresses.append(address)
    return addresses, defined


def _relocate(
    memory: mmap.mmap, code: bytes, section: _Section, place: int, start: int, addresses: list[int]
) -> None:
    for at in range(section.offset, section.offset + section.size, 24):
        offset, info, addend = struct.unpack_from("<QQq", code, at)
        kind, address = info & 0xFFFFFFFF, addresses[info >> 32]
        if address == 0:
            raise ValueError("a reference to nothing")
        value = address + addend
        if kind == _PC64:
            value -= start + place + offset
        elif kind != _ABS64:
            raise ValueError(f"relocation of kind {kind}")
        struct.pack_into("<Q", memory, place + offset, value & 0xFFFFFFFFFFFFFFFF)


def _protect(start: int, size: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = ctypes.c_void_p(start), ctypes.c_size_t(whole)
    if libc.mprotect(*pages, mmap.PROT_READ | mmap.PROT_EXEC) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def _part(code: bytes, section: _Section) -> bytes:
    part = code[section.offset : section.offset + section.size]
    if len(part) != section.size:
        raise ValueError("an object that ends too early")
    return part


def _text(code: bytes, start: int) -> bytes:
    return code[start : code.index(b"\0", start)]
