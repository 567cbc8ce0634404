"""The fixtures of the page's tests."""

from browser_page import browser, page, server, site, window

__all__ = ["browser", "page", "server", "site", "window"]
