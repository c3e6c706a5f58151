"""What tests do on the page in a browser."""

import os

PATIENCE = 20_000


def opened(browser, served, width=1280, theme="light", bypass_csp=False):
    page = browser.new_page(
        viewport={"width": width, "height": 900}, bypass_csp=bypass_csp, reduced_motion="reduce"
    )
    page.set_default_timeout(PATIENCE)
    page.requested, page.said = [], []
    page.on("request", lambda request: page.requested.append(request.url))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("console", lambda m: page.said.append(m.text) if m.type == "error" else None)
    page.goto(f"{served}?__theme={theme}")
    page.locator("#find").wait_for()
    return page


def tab(page, name):
    """Open a tab, from the menu where the window is narrow."""
    shown = page.get_by_role("tab", name=name)
    if shown.count() and shown.first.is_visible():
        shown.first.click()
    else:
        page.locator(".overflow-menu button").first.click()
        page.locator(".overflow-dropdown button", has_text=name).click()


def find(page, path):
    page.set_input_files("#hs-query-file", path)
    page.locator("#hits .hs-card").first.wait_for()


def pictures_are_there(page, where):
    page.wait_for_function(
        """(where) => { const all = [...document.querySelectorAll(where)];
        return all.length && all.every((i) => i.complete && i.naturalWidth > 0); }""",
        arg=where,
    )


def shot(page, name):
    """Save a screenshot where HISTOSEEK_SCREENSHOTS says, for the README and for looking at."""
    folder = os.environ.get("HISTOSEEK_SCREENSHOTS")
    if folder:
        page.mouse.move(0, 0)
        page.wait_for_timeout(400)
        page.screenshot(path=f"{folder}/{name}.png", full_page=True)
