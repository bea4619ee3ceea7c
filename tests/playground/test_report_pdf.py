"""Of the report's way to paper: pictures get their captions, and GIFs stay out."""

import pytest

from playground import report_pdf

MARKDOWN = """# Title

## Part

![Other words](still.png)

*What it shows, with `code` and $x^2$.* More words.

![One](a.png) ![Two](b.gif)

*A caption.*

![Moving](c.gif)

Text with a [link](#part).
"""


def test_pictures_become_figures_with_the_italic_words_below_them(tmp_path):
    pytest.importorskip("pypandoc")
    (tmp_path / "page.md").write_text(MARKDOWN)
    text = report_pdf.to_typst(tmp_path / "page.md")
    text = text[text.index("doc,\n)") if "doc,\n)" in text else 0 :]
    assert text.count("#figure(") == 2
    assert "still.png" in text and "a.png" in text and ".gif" not in text
    assert "What it shows" in text and "Other words" not in text and "One" not in text
    assert "A caption." in text.replace("\n", " ") and "<part>" in text
