"""Text as characters, split once, drawn the same way for every optimizer.

A batch is a pure function of (seed, step): the order of the data is the same for every optimizer, and a
resumed run has no generator to restore.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from emerging_optimizers.cli import UsageError

HELD_OUT = 10  # one part in HELD_OUT, the last, is for validation


@dataclass(frozen=True)
class Text:
    """A text as indices into its sorted characters."""

    source: str
    sha256: str
    vocabulary: str
    train: Tensor  # (characters,) int64
    validation: Tensor  # (characters,) int64

    def __len__(self) -> int:
        return len(self.train) + len(self.validation)

    def batch(self, seed: int, step: int, batch: int, context: int) -> tuple[Tensor, Tensor]:
        """Random training windows.

        Args:
            seed: Seed of the run.
            step: Step of the run, from 1.
            batch: Number of windows.
            context: Characters in a window.

        Returns:
            Inputs and targets, both (batch, context); a target is the character after its input.
        """
        generator = seeded(seed, step)
        starts = torch.randint(len(self.train) - context, (batch,), generator=generator)
        return _windows(self.train, starts, context)

    def places(self, context: int) -> int:
        """How many windows the held-out text has."""
        return len(self.validation) - context

    def held_out(self, count: int, context: int) -> tuple[Tensor, Tensor]:
        """Validation windows, evenly spread and the same at each call.

        Args:
            count: Number of windows; fewer where the text has fewer places to begin one.
            context: Characters in a window.

        Returns:
            Inputs and targets, both (count, context).
        """
        places = self.places(context)
        count = min(count, places)
        starts = torch.arange(count) * (places - 1) // max(count - 1, 1)
        return _windows(self.validation, starts, context)


def seeded(seed: int, step: int) -> torch.Generator:
    """A generator for one step of a run; step 0 is the initial weights."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**32)  # torch reads 32 bits of a seed


def load_text(path: str | None, context: int) -> Text:
    """Reads a text and holds out its end.

    Args:
        path: A UTF-8 file, or None for CPython's language reference (`pydoc_data.topics`, which comes
            with Python; its wording differs between versions, hence the hash).
        context: Characters in a window, to check that the text is long enough.

    Returns:
        The text.

    Raises:
        UsageError: The file cannot be read as UTF-8, or is too short.
    """
    if path is None:
        from pydoc_data.topics import topics

        source, text = "pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics))
    else:
        source = path
        try:
            if Path(path).is_char_device():  # it may have no end
                raise UsageError(f"--text {path} is a device; give a file")
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UsageError(
                f"--text {path} is not text in UTF-8: byte {error.start} cannot be read. If it is text in another "
                "encoding, convert it: iconv -f LATIN1 -t UTF-8 OLD > NEW"
            ) from error
        except OSError as error:
            raise UsageError(f"--text {path!r} cannot be read ({error.strerror or error})") from error
    needed = HELD_OUT * (context + 1)
    if len(text) < needed:
        raise UsageError(
            f"{source} is too short: its length is {len(text)} characters, and a context of {context} needs {needed}, "
            f"since the last tenth is held out and must hold {context + 1}. Give a longer text, or a shorter --context "
            "where the command has one"
        )
    vocabulary = "".join(sorted(set(text)))
    if len(vocabulary) < 2:
        raise UsageError(f"{source} repeats one character, so that there is nothing to learn; give another text")
    index = {character: i for i, character in enumerate(vocabulary)}
    ids = torch.tensor([index[character] for character in text])
    split = len(text) - len(text) // HELD_OUT
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Text(source, sha256, vocabulary, train=ids[:split], validation=ids[split:])


def _windows(ids: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    window = ids[starts[:, None] + torch.arange(context + 1)]
    return window[:, :-1], window[:, 1:]
