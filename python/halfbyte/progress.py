"""Progress bars for long loops: one helper, silent where nobody asked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, *, total: int | None = None, enabled: bool = True) -> Iterator[T]:
    """Yields `items` under a progress bar on stderr; the bar goes away when the loop ends."""
    if not enabled:
        yield from items
        return
    from tqdm.auto import tqdm  # here, so that `import halfbyte` does not pay for it

    yield from tqdm(items, desc=description, total=total, leave=False, dynamic_ncols=True)
