"""The rationalizations that the teacher writes before it teaches (`--reason_first`), and where they are kept."""

import hashlib
import json
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple


class Rationalization(NamedTuple):
    """What the teacher wrote behind a prompt."""

    ids: list[int]  # as sampled, special tokens included, without the end-of-sequence token
    is_truncated: bool  # no end-of-sequence token within the limit
    is_cached: bool  # not sampled now


class RationalizationCache:
    """
    A folder with a JSON file for each prompt: several processes and runs may use it at a time.

    Args:
        folder: made if it is not there.
        key: all that rationalizations depend on beside their prompt: weights and sampling settings.
    """

    def __init__(self, folder: str | Path, key: Sequence):
        self.folder, self.key = Path(folder), list(key)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _file(self, prompt: Sequence[int]) -> Path:
        digest = hashlib.sha256(json.dumps([self.key, list(prompt)]).encode()).hexdigest()
        return self.folder / f"{digest}.json"

    def get(self, prompt: Sequence[int]) -> Rationalization | None:
        try:
            saved = json.loads(self._file(prompt).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return Rationalization(saved["ids"], saved["is_truncated"], True)

    def put(self, prompt: Sequence[int], rationalization: Rationalization) -> None:
        content = {"ids": rationalization.ids, "is_truncated": rationalization.is_truncated, "key": self.key}
        temporary = self.folder / f"{uuid.uuid4().hex}.tmp"
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(self._file(prompt))


class Rationalizer:
    """
    Lets the teacher write, once for each prompt that is not kept yet.

    Args:
        sample: completions (token ids) of prompts (token ids), from the teacher's own weights, in one call. All processes
            call it together, whether they have prompts for it or not.
        end_ids: end-of-sequence tokens.
        cache: where rationalizations are kept, if they are.
    """

    def __init__(
        self,
        sample: Callable[[list[list[int]]], list[list[int]]],
        end_ids: Sequence[int],
        cache: RationalizationCache | None = None,
    ):
        self.sample, self.end_ids, self.cache = sample, set(end_ids), cache
        self.num_tokens = 0  # sampled since the caller set it to 0

    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[Rationalization]:
        """Equal prompts get the same one."""
        known: dict[tuple[int, ...], Rationalization | None] = {
            prompt: None if self.cache is None else self.cache.get(prompt)
            for prompt in dict.fromkeys(map(tuple, prompts))
        }
        missing = [prompt for prompt, rationalization in known.items() if rationalization is None]
        for prompt, ids in zip(missing, self.sample([list(prompt) for prompt in missing]), strict=True):
            self.num_tokens += len(ids)
            end = next((place for place, token_id in enumerate(ids) if token_id in self.end_ids), None)
            known[prompt] = Rationalization(ids[:end], end is None, False)
            if self.cache is not None:
                self.cache.put(prompt, known[prompt])
        return [known[tuple(prompt)] for prompt in prompts]
