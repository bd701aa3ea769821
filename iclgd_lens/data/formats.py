"""How rows are written as prompts, and how a tokenizer reads them: template, label words and separators, apart from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from iclgd_lens.checks import require_bool


def require_text(text: object, what: str) -> None:
    """Check that something is text that can be written.

    Args:
        text: Maybe a text.
        what: What messages call it.

    Raises:
        ValueError: If it is no string, or holds half of a character, as JSON can escape one and no tokenizer reads.
    """
    if not isinstance(text, str):
        raise ValueError(f"{what} must be text, got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!r} at position {error.start}"
        raise ValueError(f"{what} holds half of a character, {half}; write the whole character") from None


@dataclass(frozen=True)
class PromptFormat:
    """How a task's rows are written.

    Attributes:
        template: The text around a row's fields, such as `"Sentence: {sentence} Label:"`, up to where the label word follows. BOS
            stands in front of it, unless it begins with the name of BOS itself.
        separator: What stands between demonstrations; `{eos}` is the tokenizer's end-of-text token.
        space_before_labels: Whether a space stands between the template and the label word. Where the template ends with a line
            break, as chat templates do, no word is expected to begin with a space.

    Raises:
        ValueError: If the template has no field, a field without a name or with a format of its own, or unbalanced braces, or
            `space_before_labels` is neither true nor false.
    """

    template: str
    separator: str = "{eos}"
    space_before_labels: bool = True

    def __post_init__(self) -> None:
        require_text(self.template, "the template")
        require_text(self.separator, "the separator")
        require_bool("space_before_labels", self.space_before_labels)
        try:
            parts = [part for part in Formatter().parse(self.template) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"the template {self.template!r} cannot be read: {error}") from error
        names = [str(name) for _, name, _, _ in parts]
        if not names or not all(name.isidentifier() for name in names):
            raise ValueError(
                f"the template {self.template!r} must name one or more columns in braces, as in 'Review: {{text}} Label:'"
            )
        if formatted := [str(name) for _, name, style, conversion in parts if style or conversion]:
            raise ValueError(
                f"the template {self.template!r} gives the field {formatted[0]!r} a format, and texts are put in as they are; "
                f"write {{{formatted[0]}}}"
            )

    @property
    def identity(self) -> str:
        """What a task's digest is made of. The space is named only where it is left out, so that digests of tasks that have it are
        those of versions in which every task had it.
        """
        written = f"PromptFormat(template={self.template!r}, separator={self.separator!r})"
        return written if self.space_before_labels else f"{written}, no space before labels"

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the template's fields, in order."""
        return tuple(name for _, name, _, _ in Formatter().parse(self.template) if name)

    @property
    def _tail(self) -> str:
        """What the template says after its last field."""
        parts = list(Formatter().parse(self.template))
        last = max(index for index, (_, name, _, _) in enumerate(parts) if name is not None)
        return "".join(literal for literal, *_ in parts[last + 1 :])

    def prompt(self, tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> Int[Tensor, "pos"]:
        """Tokenise BOS and the template filled with a row's fields. There is one BOS, also where the text begins with its name.

        Raises:
            ValueError: If nothing is left of the text, as where a tokenizer drops characters that it does not know.
        """
        text, bos = self.template.format_map(row), bos_token(tokenizer)
        tokens = _encode(tokenizer, text)
        if tokens[:1] == [bos]:
            tokens = tokens[1:]
        if not tokens:
            raise ValueError(f"this model's tokenizer makes no tokens of the prompt {text!r}")
        return torch.tensor([bos, *tokens])

    def separator_tokens(self, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "pos"]:
        """Tokenise the separator as it stands after a label.

        Raises:
            ValueError: If the separator is to hold the end-of-text token and the tokenizer has none, or the tokenizer drops the
                separator or does not know it.
        """
        if "{eos}" in self.separator and tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no end-of-text token for the separator '{eos}'; give the task another separator")
        text = self.separator.replace("{eos}", tokenizer.eos_token or "")
        tokens = _encode_after(tokenizer, "x", text)
        if text and not tokens:
            raise ValueError(f"this model's tokenizer makes no tokens of the separator {text!r}; give the task another separator")
        if _has_unknown(tokenizer, text, tokens):
            raise ValueError(f"this model's tokenizer does not know the separator {text!r}; give the task another separator")
        return torch.tensor(tokens, dtype=torch.long)

    def label_tokens(self, tokenizer: PreTrainedTokenizerBase, label_words: Sequence[str]) -> tuple[Int[Tensor, "_label_pos"], ...]:
        """Tokenise label words as they stand after the template, with a leading space unless the format has none.

        They are tokenised after the template's last words, since some tokenizers write the beginning of a text differently.

        Raises:
            ValueError: If a word comes to no tokens or to the unknown token, or two words come to the same tokens.
        """
        # A letter stands for the field, so that the label is never the beginning of a text.
        tail, space = f"x{self._tail}", " " if self.space_before_labels else ""
        tokenised: dict[tuple[int, ...], str] = {}
        for word in label_words:
            tokens = tuple(_encode_after(tokenizer, tail, f"{space}{word}"))
            if not word.strip() or not tokens:
                raise ValueError(f"the label word {word!r} tokenises to nothing; give every class a word")
            if _has_unknown(tokenizer, word, tokens):
                raise ValueError(f"this model's tokenizer does not know the label word {word!r}")
            if tokens in tokenised:
                raise ValueError(
                    f"the label words {tokenised[tokens]!r} and {word!r} tokenise to the same tokens, {list(tokens)}, with this "
                    "model's tokenizer; choose words that it tells apart"
                )
            tokenised[tokens] = word
        return tuple(torch.tensor(tokens) for tokens in tokenised)


def bos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that prompts begin with: BOS, or end-of-text where a tokenizer has no BOS.

    Raises:
        ValueError: If it has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither a BOS nor an end-of-text token; set tokenizer.bos_token")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def _has_unknown(tokenizer: PreTrainedTokenizerBase, text: str, tokens: Sequence[int]) -> bool:
    """Whether a tokenizer reads a part of a text as its token for what it does not know, without the text naming that token."""
    return tokenizer.unk_token_id in tokens and str(tokenizer.unk_token) not in text


def _encode_after(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """Tokenise a text as it stands after another, apart from it: some tokenizers put a space in front of what they begin with.

    Where a token would reach over the boundary, they are the text's own tokens, that space taken off if that gives the text back,
    or else its tokens after a line break, which no token of a word reaches over.
    """
    if not text:
        return []
    first, whole, alone = _encode(tokenizer, before), _encode(tokenizer, before + text), _encode(tokenizer, text)
    if whole[: len(first)] == first and len(whole) > len(first):
        return whole[len(first) :]
    shown = tokenizer.decode(whole)
    line, after_line = _encode(tokenizer, "x\n"), _encode(tokenizer, f"x\n{text}")
    candidates = [alone, _encode(tokenizer, text.lstrip(" "))]
    if after_line[: len(line)] == line:
        candidates.append(after_line[len(line) :])
    return next((tokens for tokens in candidates if tokens and tokenizer.decode(first + tokens) == shown), alone)
