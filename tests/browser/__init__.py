"""The example app in a real browser, behind a real server."""
