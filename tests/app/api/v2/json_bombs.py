"""JSON bombs: request bodies of a given size that cost a naive parser much time or memory."""

from collections.abc import Callable

HEAD = b'{"inputs":[{"name":"pixels","shape":[1,8,8,3],"datatype":"UINT8","data":'
TAIL = b"}]}"
FILE_HEAD = b'{"inputs":[{"name":"image","shape":[1],"datatype":"BYTES","data":'
VALID = b'{"inputs":[{"name":"pixels","shape":[1,8,8,3],"datatype":"UINT8","data":[0]}]'


def fill(head: bytes, item: bytes, tail: bytes, n_bytes: int) -> bytes:
    """Repeat the item as often as fits."""
    return head + item * ((n_bytes - len(head) - len(tail)) // len(item)) + tail


def make_json_bombs(n_bytes: int) -> dict[str, bytes]:
    """Make bodies by what they are large in. Each is refused with 400."""
    members: dict[str, Callable[[str], bytes]] = {
        "numbers": lambda path: fill(path.encode() + b"[", b"0,", b"0]", n_bytes - 100),
        "lists": lambda path: fill(path.encode() + b"[", b"[],", b"[]]", n_bytes - 100),
        "objects": lambda path: fill(path.encode() + b"[", b"{},", b"{}]", n_bytes - 100),
        "keys": lambda path: fill(path.encode() + b"{", b'"a":0,', b'"b":0}', n_bytes - 100),
        "string": lambda path: fill(path.encode() + b'"', b"\\u0041", b'"', n_bytes - 100),
        "digits": lambda path: fill(path.encode(), b"9", b"", n_bytes - 100),
        "depth": lambda path: fill(path.encode(), b"[", b"", n_bytes - 100),
    }
    bombs = {f"{kind} in inputs": make('{"inputs":') + b"}" for kind, make in members.items()}
    for name in ("id", "parameters", "outputs"):
        bombs |= {f"{kind} in {name}": make(VALID.decode() + f',"{name}":') + b"}" for kind, make in members.items()}
    for name in ("name", "shape", "datatype", "parameters"):
        head = '{"inputs":[{"name":"pixels","shape":[1],"datatype":"UINT8","data":[0],"' + name + '":'
        bombs |= {f"{kind} in an input's {name}": make(head) + TAIL for kind, make in members.items()}
    bombs |= {f"{kind} in pixels": make(HEAD.decode()) + TAIL for kind, make in members.items()}
    bombs |= {f"{kind} in files": make(FILE_HEAD.decode()) + TAIL for kind, make in members.items()}
    return bombs | {
        "inputs": fill(b'{"inputs":[', b'{"name":"","shape":[],"datatype":""},', b"0]}", n_bytes),
        "empty strings in files": fill(FILE_HEAD + b"[", b'"",', b'""]' + TAIL, n_bytes),
        "pairs in pixels": fill(HEAD + b"[", b"[1,2],", b"[3,4]]" + TAIL, n_bytes),
        "mixed in pixels": fill(HEAD + b"[0,", b"[1],", b"2]" + TAIL, n_bytes),
        "commas in a file": fill(FILE_HEAD + b'["', b",", b'"]' + TAIL, n_bytes),
        "unknown members": fill(b"{", b'"a":{"b":[0]},', b'"c":0}', n_bytes),
        "blanks before": fill(b"", b" ", b"0", n_bytes),
        "blanks after": fill(b"0", b" ", b"", n_bytes),
        "blanks in pixels": fill(HEAD + b"[", b" ", b"0]" + TAIL, n_bytes),
        "not a number": fill(HEAD + b"[", b"NaN,", b"NaN]" + TAIL, n_bytes),
        "not UTF-8": fill(HEAD + b'"', b"\xff", b'"' + TAIL, n_bytes),
        "two bytes and four": fill(b'{"a":"\xf0\x9f\x98\x80', b"a", b'"}', n_bytes),
        "the byte order mark": fill(b"\xef\xbb\xbf[", b"0,", b"0]", n_bytes),
        "truncated": fill(HEAD + b"[", b"0,", b"", n_bytes),
    }
