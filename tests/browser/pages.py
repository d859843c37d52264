"""The chat page as a reader has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from playwright.sync_api import expect

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

    from .server import Answer, Server

expect.set_options(timeout=10_000)


class ChatPage:
    """
    Attributes:
        page: Playwright's.
    """

    def __init__(self, page: Page, server: Server) -> None:
        self.page = page
        self._server = server

    def open(self, path: str = "/chat") -> ChatPage:
        self.page.goto(path)
        expect(self.the("model")).to_have_value("remote")
        return self

    def the(self, testid: str) -> Locator:
        return self.page.get_by_test_id(testid)

    @property
    def replies(self) -> Locator:
        return self.page.locator("[data-role=assistant]")

    @property
    def reply(self) -> Locator:
        """The last one."""
        return self.replies.last

    def part(self, testid: str) -> Locator:
        """Of the last reply."""
        return self.reply.get_by_test_id(testid)

    def send(self, question: str) -> None:
        self.the("prompt").fill(question)
        self.the("prompt").press("Enter")

    def ask(self, question: str = "Why?") -> Answer:
        """Send *question* to the model "remote"; the answer is the test's to write."""
        self.send(question)
        answer = self._server.next_answer()
        assert answer.question == question
        return answer

    def ask_and_answer(self, question: str, text: str) -> None:
        answer = self.ask(question)
        answer.write(text)
        answer.finish()
        self.expect_reply("done", text)

    def expect_reply(self, state: str, text: str | None = None) -> None:
        """The last reply is in *state*, and says *text*."""
        expect(self.reply).to_have_attribute("data-state", state)
        if text is not None:
            expect(self.part("text")).to_have_text(text)
