"""A LangChain retriever over an index of muco: documents with metadata, by text, k and a filter.

    muco index rows.jsonl --model starter --index rows.index
    python examples/langchain_retriever.py rows.index "a red star" -k 3 --where "year >= 2020"

Copy MucoRetriever into your own code: it is a Runnable, so it stands in chains, batches and async calls as it is.
"""

import argparse
import sys

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableLambda

import muco
from muco.search import Index


class MucoRetriever(BaseRetriever):
    """``invoke(query)``, or ``invoke(query, k=5, where="year = 2020")`` to differ from the fields for one call."""

    index: Index
    k: int = 4
    where: str | None = None

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None, where: str | None = None
    ) -> list[Document]:
        hits = self.index.search(query, k=self.k if k is None else k, where=where or self.where)
        return [
            Document(hit.text or "", id=hit.id, metadata={**hit.extra, "image": hit.image, "score": hit.score})
            for hit in hits
        ]


def as_context(documents: list[Document]) -> str:
    """What a prompt would get."""
    return "\n".join(f"[{document.id}] {document.page_content}  {document.metadata}" for document in documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("index", help="folder made by muco index")
    parser.add_argument("query")
    parser.add_argument("-k", type=int, default=4, help="documents (default: %(default)s)")
    parser.add_argument("--where", metavar="FILTER", help="only rows of which this holds")
    args = parser.parse_args()
    retriever = MucoRetriever(index=Index.open(args.index), k=args.k, where=args.where)
    print((retriever | RunnableLambda(as_context)).invoke(args.query))


if __name__ == "__main__":
    try:
        main()
    except muco.MucoError as error:
        sys.exit(f"error: {error}")
