"""The README's and the guides' Python examples run as they stand.

The blocks of one page share a namespace and run in order, in an empty folder. A block after a comment
``<!-- not run: reason -->`` is only compiled.
"""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(<!-- not run: [^\n]+ -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[bool, str]]:
    """Whether each Python block of a page is to be run, and its source on the lines it has in the page."""
    text = page.read_text(encoding="utf-8")
    return [(match[1] is None, "\n" * text.count("\n", 0, match.start(2)) + match[2]) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
@pytest.mark.filterwarnings("ignore::halfbyte.FallbackWarning")
def test_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for run, source in blocks(page):
        code = compile(source, str(page), "exec")
        if run:
            exec(code, namespace)


def test_every_python_block_is_found() -> None:
    for page in PAGES:
        assert len(blocks(page)) == page.read_text(encoding="utf-8").count("```python\n"), page.name
