"""The prompt of ``python -m asyncio``, fed with a file: ``python repl.py FILE``.

A block goes in line by line, as a paste does, so one that a prompt would misread (no empty line after a loop) fails
here too. The first error ends it with exit status 1; the prompt itself would go on and hide it.
"""

from __future__ import annotations

import ast
import asyncio
import code
import inspect
import sys
import types
from pathlib import Path
from typing import Any


class Prompt(code.InteractiveConsole):
    def __init__(self) -> None:
        super().__init__({"__name__": "__main__", "asyncio": asyncio})
        self.compile.compiler.flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        self.statement: types.CodeType | None = None

    def runcode(self, statement: types.CodeType) -> None:
        self.statement = statement  # run by `feed`, on the event loop

    def showsyntaxerror(self, *arguments: Any, **named: Any) -> None:
        super().showsyntaxerror(*arguments, **named)
        raise SystemExit(1)

    async def feed(self, line: str) -> bool:
        """Whether the statement goes on in the next line."""
        more = self.push(line)
        if self.statement is not None:
            result = types.FunctionType(self.statement, self.locals)()
            self.statement = None
            if inspect.iscoroutine(result):
                await result
        return more


async def main(path: Path) -> None:
    prompt, more = Prompt(), False
    for line in path.read_text(encoding="utf-8").splitlines():
        more = await prompt.feed(line)
    if more and await prompt.feed(""):
        sys.exit("the block ends in the middle of a statement")


if __name__ == "__main__":
    sys.path[0] = ""  # as at a prompt: modules are found from the folder it was started in
    asyncio.run(main(Path(sys.argv[1])))
