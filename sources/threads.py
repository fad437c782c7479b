"""Image files are read and decoded by threads."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

CHUNK = 512  # images decoded before they are written


@contextlib.contextmanager
def in_threads(total, workers, title):
    """Gives a function like `map` that runs in threads, a chunk of items at a time, below a progress bar."""
    with (
        tqdm(total=total, desc=title, unit=" images", disable=None if total else True) as bar,
        ThreadPoolExecutor(max(1, workers)) as pool,  # Pillow decodes outside the interpreter's lock
    ):

        def run(function, items):
            for start in range(0, total, CHUNK):
                for result in pool.map(function, items[start : start + CHUNK]):
                    bar.update()
                    yield result

        try:
            yield run
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
