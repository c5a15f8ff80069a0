"""Forms that browsers send, and other processes that answer a request."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request

from tuneavideo.errors import TuneAVideoError


async def read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form; of a repeated field the last."""
    body = await request.body()
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=200)
    except ValueError:
        raise HTTPException(400, "the form cannot be read") from None
    return {name: value.replace("\0", "") for name, value in pairs}


async def answer_of(
    module: str, arguments: Mapping[str, Any], *words: str, seconds: float, kind: type[TuneAVideoError], what: str,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run a module in a process that reads its arguments from stdin and prints its result, both as JSON.

    Args:
        module: Name of the module.
        arguments: What it reads.
        *words: Its command line, which other users of the computer can see.
        seconds: Longest time.
        kind: Class of the errors.
        what: What it does, for messages.
        env: Its environment; by default that of the server.

    Raises:
        TuneAVideoError: Of `kind`: the process failed, or took too long.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *words, env=env, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        answer, _ = await asyncio.wait_for(process.communicate(json.dumps(arguments).encode()), seconds)
    except TimeoutError:
        raise kind(f"{what} took more than {seconds:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
    try:
        result = json.loads(answer)
    except ValueError:
        raise kind(f"{what} failed: the file is damaged, or needs too much memory or time") from None
    if "error" in result:
        raise kind(result["error"])
    return result


def answer(work: Callable[..., dict[str, Any]], describe: Callable[[Exception, Mapping[str, Any]], str]) -> None:
    """Do in this process what `answer_of` waits for.

    Args:
        work: What is done; it takes the arguments that are read, and returns the result.
        describe: Makes the message of an error from the error and the arguments.
    """
    arguments, output = json.load(sys.stdin), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print
    try:
        result = work(**arguments)
    except Exception as error:  # of any library
        result = {"error": describe(error, arguments)}
    with output:
        output.write(json.dumps(result))


def short(error: Exception) -> str:
    """Return class and message of a library's error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
