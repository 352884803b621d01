"""Runs the pages for the manual, in a few processes: heavy libraries are loaded once a process, not once a page.

`run_pages` leaves each page with its outputs in a folder; `executed` gives it back. The name of a file is the digest of
its page, so that an unchanged page is not run again.
"""
import gc
import hashlib
import multiprocessing
import os
import traceback
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
from nbformat import NotebookNode

CELL_SECONDS = 120


def place(text: str, cache: Path) -> Path:
    "Where the outputs of this page are"
    return cache/(hashlib.sha256(text.encode("utf-8")).hexdigest() + ".ipynb")


def executed(text: str, cache: Path) -> NotebookNode:
    "The page as it was run; FileNotFoundError if it never was"
    return nbformat.read(place(text, cache), as_version=4)


def run_page(page: Path, cache: Path) -> str:
    "Run one page in this process and keep its outputs; what went wrong, or nothing"
    import matplotlib.pyplot as plt
    from execnb.shell import CaptureShell, format_exc
    from nbread import page_notebook

    text = page.read_text(encoding="utf-8")
    nb = page_notebook(text)
    os.chdir(page.parent)
    shell = CaptureShell(page, mpl_format="png", timeout=CELL_SECONDS)
    for cell in nb.cells:
        if cell.cell_type != "code" or "skip-execution" in cell.metadata.get("tags", []): continue
        cell.outputs = [nbformat.from_dict(o) for o in shell.run(cell.source)]
        if shell.exc: return f"{page.name}, in the cell\n\n{cell.source}\n\n{''.join(format_exc(shell.exc))}"
    plt.close("all")
    shell.reset(new_session=False) # the page's volumes and networks
    gc.collect()
    target = place(text, cache)
    new = target.with_suffix(f".{os.getpid()}")
    new.write_text(nbformat.writes(nb), encoding="utf-8")
    os.replace(new, target)
    return ""


def attempt(page: Path, cache: Path) -> str:
    "`run_page`, for another process"
    try: return run_page(page, cache)
    except BaseException: return f"{page.name}\n{traceback.format_exc()}"


def usual_start_method() -> None:
    "A spawned process would spawn its own; pages are to start processes as anywhere else"
    multiprocessing.set_start_method(None, force=True)


def run_pages(pages: Iterable[Path], cache: Path) -> list[str]:
    "Run the pages whose outputs are not there, and drop outputs of other pages; what went wrong, page by page"
    cache.mkdir(parents=True, exist_ok=True)
    wanted = {place(p.read_text(encoding="utf-8"), cache): p for p in sorted(pages)}
    for old in set(cache.iterdir()) - set(wanted): old.unlink()
    missing = [p for target, p in wanted.items() if not target.exists()]
    if not missing: return []
    workers = min(len(missing), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), usual_start_method) as pool:
        return [told for told in pool.map(attempt, missing, [cache]*len(missing)) if told]
