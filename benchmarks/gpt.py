"""The model and the text of train.py and resolution.py: a small GPT, in plain PyTorch, over characters or tokens."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OTHERS = {"site-packages", "dist-packages", "test", "tests", "idlelib"}  # no part of the library


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) in and out."""
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """Symbols (B, T) in; logits of the next one (B, T, symbols) out, the head's weight its own."""

    def __init__(self, symbols: int, context: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(symbols, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, symbols, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def trunk(self, tokens: Tensor) -> Tensor:
        """Hidden states (B, T, width), before the head."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.blocks(self.token(tokens) + self.position(positions))  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, symbols)."""
        return self.head(self.trunk(tokens))  # type: ignore[no-any-return]


class Text:
    """A text as numbers: the first 90 % to train on, the rest to validate with."""

    default, unit = "pydoc_data.topics", "character"

    def __init__(self, path: Path | None, context: int) -> None:
        """Raises ValueError with one line to show for a file that cannot be read or is too short."""
        self.name = str(path) if path else self.default
        self.symbols, numbers = self.encode([_read(path)] if path else self.texts())
        data = torch.tensor(numbers)
        cut = len(data) * 9 // 10
        self.train, self.validation = data[:cut], data[cut:]
        self.length, self.context = len(data), context
        if len(self.validation) < context + 2:  # the context, the character after it, and one more place to begin
            raise ValueError(f"{self.name}: {len(data)} {self.unit}s, expected at least {10 * (context + 1) + 1}")

    def texts(self) -> Sequence[str]:
        """What every Python brings along: the language reference that help() reads from."""
        from pydoc_data.topics import topics

        return ["\n".join(topics[name] for name in sorted(topics))]

    def encode(self, texts: Sequence[str]) -> tuple[list[str], list[int]]:
        """The symbols, and the texts one after the other as their numbers."""
        text = "".join(texts)
        symbols = sorted(set(text))
        index = {symbol: i for i, symbol in enumerate(symbols)}
        return symbols, [index[symbol] for symbol in text]

    def batch(self, part: Tensor, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Symbols (rows, context) from random places of one part, and the symbols that follow each."""
        at = torch.randint(len(part) - self.context, (rows, 1), generator=generator)
        window = part[at + torch.arange(self.context + 1)]
        return window[:, :-1], window[:, 1:]


class Tokens(Text):
    """The same in tokens: pairs of bytes, as GPT-2's, of a vocabulary that is trained on the text."""

    default, unit = "Python's standard library", "token"

    def __init__(self, path: Path | None, context: int, vocabulary: int) -> None:
        """The vocabulary is as large as that, or as the text has pairs for."""
        self.vocabulary = vocabulary
        super().__init__(path, context)

    def texts(self) -> Sequence[str]:
        """The source of all modules, in an order that mixes packages: the last tenth is not of one kind."""
        library = Path(sysconfig.get_path("stdlib"))
        files = [file for file in library.rglob("*.py") if not OTHERS & set(file.relative_to(library).parts)]
        files.sort(key=lambda file: (file.name, str(file)))
        return [file.read_text(encoding="utf-8", errors="replace") for file in files]

    def encode(self, texts: Sequence[str]) -> tuple[list[str], list[int]]:
        """The vocabulary, and the texts as numbers of tokens."""
        from tokenizers import ByteLevelBPETokenizer  # it comes with Transformers

        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(texts, self.vocabulary, min_frequency=2, show_progress=False)
        symbols = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        return symbols, [i for encoding in tokenizer.encode_batch(list(texts)) for i in encoding.ids]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
