"""Finds photos of a folder by words or by another picture, and writes what it found as a page.

    python examples/search_photos.py photos/ "a red bicycle"
    python examples/search_photos.py photos/ ring.jpg

The first call indexes the folder, into photos.index beside it; a later one only takes in what is new, changed or gone.
No server is needed.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

import muco
from muco.search import Index, build
from muco.search.sheet import write_sheet
from muco.search.terminal import show_hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the photos are, in folders below it too")
    parser.add_argument("query", help="words, or an image file")
    parser.add_argument("--model", default="starter", help="folder or hub id (default: %(default)s)")
    parser.add_argument("--page", type=Path, default=Path("found.html"), help="(default: %(default)s)")
    parser.add_argument("-k", type=int, default=12, help="photos to find (default: %(default)s)")
    args = parser.parse_args()
    if not args.folder.is_dir():  # before the model: a mistyped path should not cost a minute
        raise muco.DataError(f"{args.folder}: no such folder")
    place, model = f"{args.folder.resolve()}.index", muco.load(args.model)
    Index.create(place, model, model_path=args.model)  # so that `muco search` finds the model too
    counts = build(args.folder, place, model, delete_missing=True)
    print(", ".join(f"{counts[name]} {name}" for name in ("encoded", "deleted", "failed")), file=sys.stderr)
    query = {"image": Path(args.query)} if os.path.isfile(args.query) else {"text": args.query}
    hits = Index.open(place, model).search(**query, k=args.k)
    show_hits(hits, Console())
    write_sheet(args.page, {args.query: hits})
    print(f"{args.page} shows them; the index is {place}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except (muco.MucoError, OSError) as error:
        sys.exit(f"error: {error}")
