"""Many questions to an HTTP endpoint, few at a time, each with a time limit, again if it fails, never twice."""

import asyncio
import hashlib
import json
import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


logger = logging.getLogger(__name__)

BACKOFF = 0.5  # seconds before the second attempt, twice as many before each further one, and at most ...
LONGEST_BACKOFF = 30.0
_WORTH_ANOTHER_TRY = (408, 409, 425, 429)  # of the statuses below 500


class JudgeError(Exception):
    """A judge has no answer."""


class _RefusedError(JudgeError):
    """Nor will it have one if it is asked again."""


@dataclass
class Endpoint:
    """
    Where and how to ask: an OpenAI-compatible server's address, headers, and limits in seconds and numbers. Answers
    are kept in a folder, each in a file whose name is a digest of what was asked.
    """

    url: str
    headers: dict[str, str]
    time_limit: float
    total_time_limit: float
    retries: int
    max_concurrency: int
    cache_dir: Path | None

    def ask(self, bodies: list[dict], num_samples: int) -> list[list[str | Exception]]:
        """`num_samples` answers to each of `bodies`, an exception in place of one that there is not."""
        keys = [[_digest(body, sample) for sample in range(num_samples)] for body in bodies]
        wanted = {
            key: body for row, body in zip(keys, bodies, strict=True) for key in row
        }  # equal ones are asked once
        answers = {key: answer for key in wanted if (answer := self._recall(key)) is not None}
        missing = {key: body for key, body in wanted.items() if key not in answers}
        if missing:
            with ThreadPoolExecutor(1) as pool:  # a notebook's thread has an event loop already
                answers |= pool.submit(asyncio.run, self.ask_all(missing)).result()
        return [[answers[key] for key in row] for row in keys]

    async def ask_all(self, bodies: dict[str, dict]) -> dict[str, str | Exception]:
        import httpx2

        places, failed = asyncio.Semaphore(self.max_concurrency), [0]  # in a row, since the last answer
        limits = httpx2.Limits(max_connections=None)  # whoever waits for a place has all of its time still
        async with httpx2.AsyncClient(timeout=self.time_limit, limits=limits, headers=self.headers) as client:

            async def answer(key: str, body: dict) -> str | Exception:
                failure = None
                for attempt in range(self.retries + 1):
                    if failure is not None:
                        await asyncio.sleep(min(BACKOFF * 2 ** (attempt - 1), LONGEST_BACKOFF))
                    async with places:
                        if failed[0] > self.max_concurrency * (self.retries + 1):
                            return failure or JudgeError("the endpoint failed too often in a row")
                        try:
                            text = await asyncio.wait_for(_post(client, self.url, body), self.time_limit)
                        except (asyncio.TimeoutError, httpx2.TimeoutException):
                            failure = JudgeError(f"no answer within {self.time_limit} s")
                        except (httpx2.HTTPError, httpx2.StreamError) as error:
                            failure = JudgeError(f"{type(error).__name__}: {error}")
                        except JudgeError as error:
                            failure = error
                        else:
                            failed[0] = 0
                            self._remember(key, text)
                            return text
                        failed[0] += 1
                        if isinstance(failure, _RefusedError):
                            break
                return failure

            tasks = {key: asyncio.create_task(answer(key, body)) for key, body in bodies.items()}
            _, late = await asyncio.wait(tasks.values(), timeout=self.total_time_limit)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        too_late = JudgeError(f"no answer within `total_time_limit={self.total_time_limit}` s")
        return {key: too_late if task in late else task.result() for key, task in tasks.items()}

    # ---------------------------------------------------------------------------------------------------------- cache

    def _recall(self, key: str) -> str | None:
        if self.cache_dir is None:
            return None
        try:
            return json.loads((self.cache_dir / key[:2] / key).read_text())
        except (OSError, ValueError):  # there is none, or no whole one
            return None

    def _remember(self, key: str, answer: str) -> None:
        if self.cache_dir is None:
            return
        folder = self.cache_dir / key[:2]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=folder)
            with os.fdopen(handle, "w") as file:
                file.write(json.dumps(answer))
            os.replace(name, folder / key)  # never half a file, also with several processes
        except OSError as error:
            logger.warning(f"`cache_dir={str(self.cache_dir)!r}`: an answer could not be kept ({error}).")


def _digest(body: dict, sample: int) -> str:
    return hashlib.sha256(json.dumps([body, sample], sort_keys=True).encode()).hexdigest()


async def _post(client, url: str, body: dict) -> str:
    response = await client.post(url, content=json.dumps(body))
    status = response.status_code
    if status >= 500 or status in _WORTH_ANOTHER_TRY:
        raise JudgeError(f"status {status}")
    if status != 200:
        raise _RefusedError(f"status {status}: {response.text[:200]}")
    try:
        answer = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise JudgeError("a reply that is no chat completion") from None
    if not isinstance(answer, str):
        raise JudgeError("a reply without text")
    return answer
