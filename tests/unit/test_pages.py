"""Places for measured tables in Markdown pages."""

import pages
import pytest


def test_a_place_is_filled_in_and_the_prose_stays():
    text = "before\n<!-- speed: new -->\nold\n<!-- end -->\n<!-- other: new -->\n<!-- end -->\n"
    filled = pages.fill(text, "speed", {"new": "a \\1 table"})
    assert filled == text.replace("old", "a \\1 table")
    assert pages.fill(filled, "speed", {"new": "a \\1 table"}) == filled


def test_a_mark_that_names_nothing_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- speed: denz -->\n<!-- end -->")
    with pytest.raises(
        ValueError, match=r"page\.md: <!-- speed: denz -->: no such table; there are"
    ):
        pages.refill(page, "speed", {"dense": ""})
    with pytest.raises(ValueError, match="no place for a table: <!-- other: NAME -->"):
        pages.refill(page, "other", {})
    assert page.read_text() == "<!-- speed: denz -->\n<!-- end -->"
