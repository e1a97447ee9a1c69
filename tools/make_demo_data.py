"""Make the pairs that the package carries (declip/data/demo) from a folder of source files.

    python tools/make_demo_data.py FOLDER [OUT]

FOLDER holds emoji_{noto,twemoji,fluent3d}.parquet (key, image, name, keywords, group, artist, codepoint) and
wordnet_synonyms.tsv.gz. Image bytes and synonyms are copied unchanged. The licences are in the NOTICE beside the
output, which is written by hand.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ARTISTS = ("noto", "twemoji", "fluent3d")
OUT = Path(__file__).parents[1] / "src" / "declip" / "data" / "demo"


def make_pairs(source: Path) -> pa.Table:
    """One artist's pairs: the first caption is the name, the second adds the keywords where there are any."""
    rows = pq.read_table(source)
    captions = [
        [name, f"{name}: {', '.join(keywords)}" if keywords else name]
        for name, keywords in zip(rows["name"].to_pylist(), rows["keywords"].to_pylist(), strict=True)
    ]
    return pa.table(
        {
            "key": rows["key"],
            "image": rows["image"],
            "captions": pa.array(captions, pa.list_(pa.string())),
            "label": rows["group"],
            "codepoint": rows["codepoint"],
            "artist": rows["artist"],
        }
    )


def main(folder: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for artist in ARTISTS:
        pairs = make_pairs(folder / f"emoji_{artist}.parquet")
        target = out / f"{artist}.parquet"
        pq.write_table(pairs, target, compression="zstd")
        print(f"{target}: {pairs.num_rows} pairs, {target.stat().st_size:,} bytes")
    target = out / "synonyms.tsv.gz"
    shutil.copyfile(folder / "wordnet_synonyms.tsv.gz", target)
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else OUT)
