"""Training windows, a function of the seed and the step alone, so that a resumed run sees what an unbroken one sees."""

import random
from dataclasses import dataclass, field

import torch
from recall import make_document
from tokenizers import Tokenizer
from torch import Tensor
from vocabulary import END_ID

WINDOW = 1024  # the model's block size
IGNORED = -100
RECALL_SHARE = 10  # one window in so many is a long-range document


def inputs_and_targets(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Where the next token would be a document's start there is no loss: the model never learns to end by itself."""
    targets = windows[:, 1:].clone()
    targets[targets == END_ID] = IGNORED
    return windows[:, :-1], targets


def held_out_windows(texts: list[str], tokenizer: Tokenizer) -> Tensor:
    """Every token once; each window starts with the start token, the last one is filled with it (and so ignored)."""
    stream = [token for text in texts for token in (END_ID, *tokenizer.encode(text).ids)]
    stream += [END_ID] * (-len(stream) % WINDOW)
    body = torch.tensor(stream).view(-1, WINDOW)
    return torch.cat((torch.full((len(body), 1), END_ID), body), dim=1)


@dataclass
class Batches:
    texts: list[str]
    tokenizer: Tokenizer
    seed: int
    batch_size: int
    _epoch: int = field(default=-1, init=False)
    _windows: Tensor = field(init=False)
    _recalled: Tensor = field(init=False)

    def __post_init__(self) -> None:
        encoded = self.tokenizer.encode_batch(self.texts)
        self.documents = [torch.tensor([END_ID, *encoding.ids]) for encoding in encoded]
        self.tokens = sum(map(len, self.documents))
        self.plain = (self.tokens - WINDOW) // WINDOW
        self.recall = self.plain // (RECALL_SHARE - 1)
        self.steps_per_epoch = (self.plain + self.recall) // self.batch_size

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Windows, and which of their targets are values that the window has defined before."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._make(epoch)
        rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return self._windows[rows], self._recalled[rows]

    def _make(self, epoch: int) -> None:
        """One pass over the library in a new order, cut at a new offset, with new long-range documents among it."""
        rng = random.Random(f"{self.seed}-{epoch}")
        order = rng.sample(range(len(self.documents)), len(self.documents))
        offset = rng.randrange(WINDOW)
        stream = torch.cat([self.documents[index] for index in order])[offset : offset + self.plain * WINDOW]
        plain = torch.cat((torch.full((self.plain, 1), END_ID), stream.view(-1, WINDOW)), dim=1)
        made = [make_document(rng, self.texts, self.tokenizer, WINDOW + 1) for _ in range(self.recall)]
        recalled = torch.zeros(self.plain + self.recall, WINDOW, dtype=torch.bool)
        for row, document in enumerate(made, self.plain):
            for first, end, _ in document.answers:
                recalled[row, first - 1 : end - 1] = True  # the target of position i is token i + 1
        windows = torch.cat((plain, torch.tensor([document.ids for document in made])))
        order = rng.sample(range(len(windows)), len(windows))
        self._windows, self._recalled, self._epoch = windows[order], recalled[order], epoch
