"""Prompts as tokens: what is checked, how parts are joined, and that tokenising them apart changes no token."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from iclgd_lens.data.formats import PromptFormat, bos_token
from iclgd_lens.data.prompts import Demonstration, Query, as_label_tokens, context_tokens
from iclgd_lens.models.bundled.learner import build_tokenizer
from tests.tokenizers_zoo import gpt2_style, llama_style, wordless_style

TEXT = "a dull and moving film"
CORPUS = ["Sentence: a gripping and moving film Label: Positive", "Sentence: a dull, endless film Label: Negative"]
TEMPLATES = ["Sentence: {text} Label:", "{text}\nSentiment:", "Say of '{text}'"]
WORDS = ["Positive", "Negative", "film of films", "lag"]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A small tokenizer of GPT-2's kind: byte-level BPE, end-of-text and no BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def metaspace_tokenizer(prepend_scheme: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of Llama's kind: BPE over words that begin with ▁, and a BOS that `encode` puts in front."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def normalising_tokenizer() -> PreTrainedTokenizerFast:
    """The same in the older way of Llama 2 and Mistral: a normaliser puts ▁ in front of every text, a space or not."""
    tokenizer = metaspace_tokenizer("always")
    tokenizer.backend_tokenizer.pre_tokenizer = None
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """The same without words: tokens reach over spaces, from the template's end into the label."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "byte-level": byte_level_tokenizer,
    "metaspace-first": lambda: metaspace_tokenizer("first"),
    "metaspace-always": lambda: metaspace_tokenizer("always"),
    "normaliser": normalising_tokenizer,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


def demonstration(tokens: list[int], separator: list[int]) -> Demonstration:
    return Demonstration(torch.tensor(tokens), 1, torch.tensor(separator, dtype=torch.long))


@pytest.mark.parametrize("n_label_tokens", [3, 4])
def test_a_demonstration_needs_bos_and_at_least_one_label_token(n_label_tokens):
    with pytest.raises(ValueError, match=f"n_label_tokens={n_label_tokens} does not fit a demonstration of 3 tokens"):
        Demonstration(torch.tensor([1, 2, 3]), n_label_tokens)


@pytest.mark.unchecked_shapes
def test_a_demonstration_is_one_sequence():
    with pytest.raises(ValueError, match=r"got shape \[1, 3\]"):
        Demonstration(torch.tensor([[1, 2, 3]]), 1)


def test_a_demonstration_may_be_all_label_and_has_no_separator_by_default():
    only_label = Demonstration(torch.tensor([1, 2, 3]), 2)
    assert only_label.separator.tolist() == []
    assert only_label.label is None


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("tokens", [[1], [], [[1, 2]]])
def test_a_query_is_one_sequence_of_bos_and_more(tokens):
    with pytest.raises(ValueError, match="BOS and at least one more token"):
        Query(torch.tensor(tokens))


def test_context_keeps_a_single_bos_and_every_separator():
    joined = context_tokens([demonstration([9, 1, 2], [7, 8]), demonstration([9, 3, 4, 5], []), demonstration([9, 6, 6], [7])])
    assert joined.tolist() == [9, 1, 2, 7, 8, 3, 4, 5, 6, 6, 7]


def test_context_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no demonstrations"):
        context_tokens([])


def test_context_of_different_bos_tokens_is_refused():
    with pytest.raises(ValueError, match=r"same BOS token; got \[8, 9\]"):
        context_tokens([demonstration([9, 1, 2], []), demonstration([8, 1, 2], [])])


def test_fields_are_the_names_in_braces_in_order():
    assert PromptFormat("{premise} Question: {hypothesis}. {{not a field}} Answer:").fields == ("premise", "hypothesis")


@pytest.mark.parametrize("template", ["Review: Label:", "", "{{text}} Label:", "{} Label:"])
def test_a_template_without_a_named_field_is_refused(template):
    with pytest.raises(ValueError, match="must name one or more columns in braces"):
        PromptFormat(template)


def test_a_prompt_is_bos_and_the_filled_template():
    tokenizer = build_tokenizer()
    prompt = PromptFormat("Words: {text} Label:").prompt(tokenizer, {"text": "lion bread"})
    assert tokenizer.convert_ids_to_tokens(prompt.tolist()) == ["<bos>", "Words:", "lion", "bread", "Label:"]


def tokens_of_prompt_and_label(tokenizer: PreTrainedTokenizerFast, template: str, word: str) -> list[int]:
    written = PromptFormat(template)
    (label,) = written.label_tokens(tokenizer, [word])
    return torch.cat([written.prompt(tokenizer, {"text": TEXT}), label]).tolist()


def tokens_of_the_whole_string(tokenizer: PreTrainedTokenizerFast, template: str, word: str) -> list[int]:
    text = f"{template.format(text=TEXT)} {word}"
    return [bos_token(tokenizer), *tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("word", WORDS)
def test_prompt_and_label_are_the_tokens_of_the_whole_string(tokenizer, template, word):
    apart = tokens_of_prompt_and_label(tokenizer, template, word)
    assert apart == tokens_of_the_whole_string(tokenizer, template, word)


def test_a_label_may_follow_a_field_directly(tokenizer):
    apart = tokens_of_prompt_and_label(tokenizer, "{text}", "Positive")
    assert apart == tokens_of_the_whole_string(tokenizer, "{text}", "Positive")


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("word", ["Positive", "Negative"])
def test_the_label_s_positions_spell_the_label_with_its_space(tokenizer, template, word):
    (label,) = PromptFormat(template).label_tokens(tokenizer, [word])
    spelled = "".join(tokenizer.convert_ids_to_tokens(label.tolist()))
    assert spelled in (f"Ġ{word}", f"▁{word}")
    assert len(label) > 1


def test_a_gpt2_style_context_is_the_tokens_of_the_whole_prompt():
    tokenizer = byte_level_tokenizer()
    written = PromptFormat("Sentence: {text} Label:")
    labels = written.label_tokens(tokenizer, ["Positive", "Negative"])
    prompt = written.prompt(tokenizer, {"text": TEXT})
    separator = written.separator_tokens(tokenizer)
    demonstrations = [Demonstration(torch.cat([prompt, label]), len(label), separator) for label in labels]
    shown = "".join(f"Sentence: {TEXT} Label: {word}<|endoftext|>" for word in ("Positive", "Negative"))
    assert context_tokens(demonstrations).tolist() == tokenizer.encode(f"<|endoftext|>{shown}", add_special_tokens=False)


def test_the_eos_separator_is_the_single_end_of_text_token(tokenizer):
    assert PromptFormat("{text}").separator_tokens(tokenizer).tolist() == [tokenizer.eos_token_id]


def test_a_separator_may_hold_text_around_eos():
    tokenizer = byte_level_tokenizer()
    tokens = PromptFormat("{text}", separator="\n{eos}\n").separator_tokens(tokenizer).tolist()
    newline = tokenizer.encode("\n", add_special_tokens=False)
    assert tokens == [*newline, tokenizer.eos_token_id, *newline]


def test_an_empty_separator_is_no_tokens():
    tokens = PromptFormat("{text}", separator="").separator_tokens(build_tokenizer())
    assert tokens.tolist() == []
    assert tokens.dtype == torch.long


@pytest.mark.parametrize("word", ["", "  "])
def test_an_empty_label_word_is_refused(tokenizer, word):
    with pytest.raises(ValueError, match=f"label word {word!r} tokenises to nothing"):
        PromptFormat("{text} Label:").label_tokens(tokenizer, ["Positive", word])


def test_a_label_word_written_twice_is_refused(tokenizer):
    with pytest.raises(ValueError, match="'Positive' and 'Positive' tokenise to the same tokens"):
        PromptFormat("{text} Label:").label_tokens(tokenizer, ["Positive", "Negative", "Positive"])


def test_a_label_word_that_a_tokenizer_does_not_know_is_refused():
    with pytest.raises(ValueError, match="does not know the label word 'Positive'"):
        PromptFormat("{text} Label:").label_tokens(build_tokenizer(), ["animals", "Positive"])


def test_a_template_with_unbalanced_braces_is_refused():
    with pytest.raises(ValueError, match=r"template '\{text' cannot be read"):
        PromptFormat("{text")


def test_an_end_of_text_separator_needs_an_end_of_text_token():
    tokenizer = metaspace_tokenizer("first")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token for the separator"):
        PromptFormat("{text}").separator_tokens(tokenizer)


def test_prompts_begin_with_bos_and_else_with_end_of_text():
    assert bos_token(metaspace_tokenizer("first")) == 1
    assert bos_token(byte_level_tokenizer()) == 0


def test_a_tokenizer_with_neither_bos_nor_end_of_text_is_refused():
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match=r"neither a BOS nor an end-of-text token; set tokenizer\.bos_token"):
        bos_token(bare)


def test_a_query_whose_label_word_has_no_tokens_is_refused():
    with pytest.raises(ValueError, match="label word 1 has no tokens"):
        Query(torch.tensor([1, 2]), (torch.tensor([3]), torch.tensor([], dtype=torch.long)))


def test_a_label_that_merges_with_the_template_is_spelled_with_one_space_all_the_same():
    tokenizer, template = merging_tokenizer(), "Sentence: {text} Label:"
    written = PromptFormat(template)
    prompt, (label,) = written.prompt(tokenizer, {"text": TEXT}), written.label_tokens(tokenizer, ["Positive"])
    whole = f"{template.format(text=TEXT)} Positive"
    assert tokenizer.encode(whole, add_special_tokens=False)[: len(prompt) - 1] != prompt[1:].tolist()  # it does merge
    assert tokenizer.decode(torch.cat([prompt[1:], label])) == whole


@pytest.mark.parametrize("separator", ["\n", "a film", "."])
def test_a_separator_has_no_space_that_a_tokenizer_puts_in_front_of_texts(separator):
    tokenizer = llama_style()
    letter = tokenizer.encode("x", add_special_tokens=False)
    tokens = PromptFormat("{text}", separator).separator_tokens(tokenizer).tolist()
    assert tokenizer.decode([*letter, *tokens]) == f"x{separator}"


@pytest.mark.parametrize("field", ["{text!r}", "{text:>10}", "{text:{width}}"])
def test_a_field_with_a_format_is_refused(field):
    with pytest.raises(ValueError, match=r"gives the field 'text' a format, and texts are put in as they are; write \{text\}"):
        PromptFormat(f"Review: {field} Label:")


@pytest.mark.parametrize(
    ("template", "separator", "message"),
    [
        ("\ud83d {text}", "", r"the template holds half of a character, '\\ud83d' at position 0"),
        ("{text}", "a\udc00", r"the separator holds half of a character, '\\udc00' at position 1"),
        (3, "", "the template must be text, got 3"),
        ("{text}", None, "the separator must be text, got None"),
    ],
)
def test_a_template_and_a_separator_are_whole_text(template, separator, message):
    with pytest.raises(ValueError, match=message):
        PromptFormat(template, separator)


def test_a_text_of_which_a_tokenizer_leaves_nothing_is_named():
    backend = Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>"))
    backend.normalizer = normalizers.Replace("\u200b", "")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    with pytest.raises(ValueError, match=r"makes no tokens of the prompt '\\u200b'"):
        PromptFormat("{text}").prompt(tokenizer, {"text": "\u200b"})


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int32, torch.uint8])
def test_tokens_are_numbers_that_embeddings_are_looked_up_by(dtype):
    whole, other = torch.tensor([1, 2, 3]), torch.tensor([1, 1, 1], dtype=dtype)
    for make, what in (
        (lambda: Demonstration(other, 1), "tokens"),
        (lambda: Demonstration(whole, 1, other), "the tokens of a separator"),
        (lambda: Query(other), "a query's tokens"),
        (lambda: Query(whole, (whole, other)), "the tokens of label word 1"),
    ):
        with pytest.raises(ValueError, match=rf"{what} must be whole numbers of dtype torch\.int64, got {dtype}"):
            make()


# Digests, label words and label indices


def token_tensors() -> tuple[torch.Tensor, ...]:
    return torch.tensor([5, 6]), torch.tensor([7, 8])


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    "given",
    [
        torch.tensor([[5, 6], [7, 8]]),
        list(token_tensors()),
        token_tensors(),
        {0: token_tensors()[0], 1: token_tensors()[1]}.values(),
        (tokens for tokens in token_tensors()),
    ],
    ids=["one tensor", "list", "tuple", "view", "generator"],
)
def test_label_words_are_taken_in_any_ordered_form(given):
    query = Query(torch.tensor([1, 2]), given, 1)
    assert isinstance(query.label_tokens, tuple)
    assert [tokens.tolist() for tokens in query.label_tokens] == [[5, 6], [7, 8]]


def test_a_tuple_of_label_words_is_kept_as_it_is_so_that_queries_share_it():
    words = token_tensors()
    assert as_label_tokens(words) is words


@pytest.mark.unchecked_shapes
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor([5, 6]), r"a row per class, got shape \[2\]; give words of one token each as label_tokens\[:, None\]"),
        (torch.tensor(5), r"a row per class, got shape \[\]$"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"a row per class, got shape \[1, 2, 3\]"),
        (torch.tensor([[5.0, 6.0]]), "the tokens of label word 0 must be whole numbers of dtype torch.int64, got torch.float32"),
        (torch.empty(2, 0, dtype=torch.long), "label word 0 has no tokens"),
        ([torch.tensor([5]), 6], "the tokens of label word 1 must be a tensor of token numbers, .* got int 6"),
        ([torch.tensor([5]), [6]], r"the tokens of label word 1 must be a tensor of token numbers, .* got list \[6\]"),
        ([torch.tensor([[5]])], r"the tokens of label word 0 must be one sequence, \[pos\]; got shape \[1, 1\]"),
        (["good", "bad"], "the tokens of label word 0 must be a tensor of token numbers, .* got str 'good'"),
        ("good", "label_tokens must be several items in an order, .* got str 'good'"),
        ({0: torch.tensor([5])}, "label_tokens must be several items in an order, .* got dict"),
        (set(token_tensors()), "label_tokens must be given in an order, and a set has another one in every process"),
        (None, "label_tokens must be several items in an order"),
    ],
)
def test_other_forms_of_label_words_are_refused_by_name(given, message):
    for take in (as_label_tokens, lambda words: Query(torch.tensor([1, 2]), words)):
        with pytest.raises(ValueError, match=message):
            take(given)


@pytest.mark.parametrize("label", [-1, 1.0, True, "1", torch.tensor(True), torch.tensor([1])])
def test_a_label_is_the_index_of_a_class(label):
    for make in (lambda: Demonstration(torch.tensor([1, 2, 3]), 1, label=label), lambda: Query(torch.tensor([1, 2]), label=label)):
        with pytest.raises(ValueError, match="label must be a whole number of at least 0, got"):
            make()


@pytest.mark.parametrize("label", [2, 7])
def test_a_query_s_label_is_the_index_of_one_of_its_label_words(label):
    with pytest.raises(ValueError, match=f"label must be the index of one of the 2 label words, 0 to 1; got {label}"):
        Query(torch.tensor([1, 2]), token_tensors(), label)
    assert Query(torch.tensor([1, 2]), label=label).label == label  # without words, anything may be


@pytest.mark.parametrize("label", [1, np.int64(1), torch.tensor(1)])
def test_numbers_of_numpy_and_torch_are_label_indices(label):
    query, demonstration = (
        Query(torch.tensor([1, 2]), token_tensors(), label),
        Demonstration(torch.tensor([1, 2, 3]), label, label=label),
    )
    assert [type(each) for each in (query.label, demonstration.label, demonstration.n_label_tokens)] == [int] * 3


@pytest.mark.parametrize("n_label_tokens", [0, -1, 1.0, True, "1", None])
def test_the_number_of_label_tokens_is_a_whole_number_of_at_least_1(n_label_tokens):
    with pytest.raises(ValueError, match="n_label_tokens must be a whole number of at least 1, got"):
        Demonstration(torch.tensor([1, 2, 3]), n_label_tokens)


@pytest.mark.unchecked_shapes
def test_a_separator_and_tokens_are_one_sequence_in_a_tensor():
    tokens = torch.tensor([1, 2, 3])
    with pytest.raises(ValueError, match=r"the tokens of a separator must be one sequence, \[pos\]; got shape \[1, 1\]"):
        Demonstration(tokens, 1, torch.tensor([[7]]))
    with pytest.raises(ValueError, match=r"tokens must be a tensor of token numbers, \[pos\]; got list \[1, 2, 3\]"):
        Demonstration([1, 2, 3], 1)
    with pytest.raises(ValueError, match=r"a query's tokens must be a tensor of token numbers, \[pos\]; got list"):
        Query([1, 2, 3])


# The space before labels, and BOS


@pytest.mark.parametrize("template", ["{text}\nassistant\n", "{text}\n", "Review: {text}\n\nLabel:\n"])
@pytest.mark.parametrize("word", ["Positive", "Negative"])
def test_without_the_space_a_label_after_a_line_break_is_the_tokens_of_the_whole_string(template, word):
    tokenizer = byte_level_tokenizer()
    written = PromptFormat(template, space_before_labels=False)
    (label,) = written.label_tokens(tokenizer, [word])
    whole = tokenizer.encode(f"{template.format(text=TEXT)}{word}", add_special_tokens=False)
    assert torch.cat([written.prompt(tokenizer, {"text": TEXT}), label]).tolist() == [bos_token(tokenizer), *whole]
    assert "".join(tokenizer.convert_ids_to_tokens(label.tolist())) == word


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("make", [gpt2_style, llama_style, wordless_style])
def test_without_the_space_prompt_and_label_spell_the_text_with_none(make, template):
    tokenizer = make()
    written = PromptFormat(template, space_before_labels=False)
    prompt, (label,) = written.prompt(tokenizer, {"text": TEXT}), written.label_tokens(tokenizer, ["Positive"])
    shown = tokenizer.decode(torch.cat([prompt[1:], label]), clean_up_tokenization_spaces=False)
    assert shown == f"{template.format(text=TEXT)}Positive"


@pytest.mark.parametrize("make", [gpt2_style, llama_style, merging_tokenizer, *TOKENIZERS.values()])
@pytest.mark.parametrize("template", [*TEMPLATES, "{text} Positive or"])
@pytest.mark.parametrize("word", ["Positive", "film", "a"])
def test_without_the_space_no_tokenizer_puts_one_in(make, template, word):
    tokenizer = make()
    (label,) = PromptFormat(template, space_before_labels=False).label_tokens(tokenizer, [word])
    assert "".join(tokenizer.convert_ids_to_tokens(label.tolist())) == word


@pytest.mark.parametrize("given", ["no", 0, None])
def test_the_space_is_there_or_not(given):
    with pytest.raises(ValueError, match="space_before_labels must be True or False, got"):
        PromptFormat("{text}", space_before_labels=given)


@pytest.mark.parametrize("make", [byte_level_tokenizer, lambda: metaspace_tokenizer("first"), normalising_tokenizer])
@pytest.mark.parametrize("template", ["{bos}Sentence: {text} Label:", "{text} Label:"])
def test_a_text_that_begins_with_bos_has_one(make, template):
    tokenizer = make()
    name = tokenizer.convert_ids_to_tokens(bos_token(tokenizer))
    text = TEXT if "{bos}" in template else f"{name}{TEXT}"
    prompt = PromptFormat(template.replace("{bos}", name)).prompt(tokenizer, {"text": text})
    whole = tokenizer.encode(template.replace("{bos}", name).format(text=text), add_special_tokens=False)
    assert prompt.tolist() == whole
    assert prompt.tolist().count(bos_token(tokenizer)) == 1


@pytest.mark.parametrize("text", ["\n", "?"])
def test_a_separator_that_a_tokenizer_drops_or_does_not_know_is_refused(text):
    with pytest.raises(ValueError, match=r"(makes no tokens of|does not know) the separator .*; give the task another separator"):
        PromptFormat("{text}", text).separator_tokens(build_tokenizer())
