"""A token is trained if it lies wholly inside a span, however its tokenizer divides characters."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from sftstream import Refused
from sftstream.records import Example, Rendered, Span
from sftstream.tokenization.tokenizer import Tokenizer

BOM, STOP = "<|begin_of_text|>", "<|eot_id|>"


def rendered(text: str, *parts: str) -> Rendered:
    """The text with a span over the first place of each part."""
    return Rendered(text, tuple(at for part in parts for at in (text.index(part), text.index(part) + len(part))))


def trained_text(tokenizer: Tokenizer, text: Rendered) -> str:
    example = tokenizer.encode(text)
    return str(tokenizer.hf.decode(example.tokens[example.loss_mask]))


def edited(directory: str, target: Path, **changes: Any) -> str:
    """A copy of the tokenizer whose tokenizer.json has other values under some keys."""
    PreTrainedTokenizerFast.from_pretrained(directory).save_pretrained(str(target))
    file = target / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(target)


def with_normalizer(directory: str, target: Path, normalizer: Any) -> Tokenizer:
    return Tokenizer(edited(directory, target, normalizer=json.loads(normalizer.__getstate__())))


def test_tokens_and_mask_are_those_of_the_text(tokenizer: str) -> None:
    text = f"{BOM}ab{STOP}cd{STOP}"
    example = Tokenizer(tokenizer).encode(rendered(text, "ab" + STOP))
    words = Tokenizer(tokenizer).hf.convert_ids_to_tokens(example.tokens.tolist())
    assert words == [BOM, "a", "b", STOP, "c", "d", STOP]
    assert example.loss_mask.tolist() == [False, True, True, True, False, False, False]
    assert (example.tokens.dtype, example.loss_mask.dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize(
    "text", ["\U0001f600", "e\u0301", "\u4f60\u597d", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\x00\n"]
)
def test_every_piece_of_a_split_character_is_trained_or_none(tokenizer: str, text: str) -> None:
    loaded = Tokenizer(tokenizer)
    whole = f"{BOM}{text}{STOP}{text}{STOP}{text}"
    start = whole.index(STOP) + len(STOP)
    example = loaded.encode(Rendered(whole, (start, start + len(text + STOP))))
    assert loaded.hf.decode(example.tokens[example.loss_mask]) == text + STOP
    assert example.loss_mask.sum() == len(text.encode()) + 1


def test_a_token_across_a_spans_border_is_not_trained(tokenizer: str) -> None:
    loaded = Tokenizer(tokenizer)
    text = "the river" + STOP  # "river" is one token with its space
    assert trained_text(loaded, rendered(text, "river" + STOP)) == STOP
    assert trained_text(loaded, rendered(text, " river" + STOP)) == " river" + STOP


def test_where_nothing_lies_wholly_inside_a_span_the_example_is_refused(tokenizer: str) -> None:
    for text in (rendered("the river", "riv"), rendered("the river")):
        with pytest.raises(
            Refused, match="nothing to train: no token lies wholly inside a span that the policy trains"
        ):
            Tokenizer(tokenizer).encode(text)


@pytest.mark.parametrize("before", ["", "e\u0301", "\u212b", "\uac00\u1100\u1161"])
def test_spans_are_found_where_a_normalizer_changes_lengths(tokenizer: str, tmp_path: Path, before: str) -> None:
    composing = with_normalizer(tokenizer, tmp_path, normalizers.NFC())
    answer = "e\u0301 \u212b a\u030a"
    text = f"{BOM}{before}{STOP}{answer}{STOP}{before}"
    start = text.index(STOP) + len(STOP)
    span = Span(start, start + len(answer + STOP))
    assert (
        trained_text(composing, Rendered(text, (span.start, span.end))) == unicodedata.normalize("NFC", answer) + STOP
    )


def test_a_first_token_is_trained_and_no_target(tokenizer: str) -> None:
    texts = [rendered("ab" + STOP, "ab" + STOP), rendered("ab" + STOP, STOP), Rendered("", ())]
    loaded = Tokenizer(tokenizer)
    whole, end, nothing = loaded.encode_all(texts)
    assert isinstance(whole, Example)
    assert isinstance(end, Example)
    assert isinstance(nothing, Refused)
    assert (whole.targets, end.targets) == (len(whole.tokens) - 1, 1)
    assert whole.loss_mask.all()
    assert str(loaded.encode_all([Rendered("", ())])[0]).startswith("nothing to train")


def test_a_text_whose_tokens_do_not_tile_it_is_refused(tokenizer: str, tmp_path: Path) -> None:
    dropping = Tokenizer(edited(tokenizer, tmp_path, pre_tokenizer=_drops_digits()))
    assert trained_text(dropping, rendered("ab" + STOP, "ab" + STOP)) == "ab" + STOP
    with pytest.raises(Refused, match="tokens do not tile the text: the tokens hold 12 bytes of the text's 13"):
        dropping.encode(rendered("a1b" + STOP, "b" + STOP))


def _drops_digits() -> Any:
    steps = [pre_tokenizers.Split("1", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return json.loads(pre_tokenizers.Sequence(steps).__getstate__())


def test_truncation_and_padding_stored_with_a_tokenizer_are_not_applied(tokenizer: str, tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    text = rendered(f"{BOM}seven rivers{STOP}", f"seven rivers{STOP}")
    stored = Tokenizer(edited(tokenizer, tmp_path, truncation=truncation, padding=padding))
    assert stored.encode(text).tokens.tolist() == Tokenizer(tokenizer).encode(text).tokens.tolist()


def _character_tokenizer(directory: Path, normalizer: Any = None) -> Tokenizer:
    """A vocabulary that is not byte-level: one token a character."""
    letters = {letter: i for i, letter in enumerate("\u2581abcdefghijklmnopqrstuvwxyz\u00e9?")}
    backend = Backend(models.BPE(vocab=letters, merges=[], unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
    if normalizer:
        backend.normalizer = normalizer
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=STOP)
    fast.save_pretrained(str(directory))
    return Tokenizer(str(directory))


def test_a_vocabulary_that_is_not_byte_level_is_placed_by_its_offsets(tmp_path: Path) -> None:
    characters = _character_tokenizer(tmp_path, normalizers.NFC())
    text = f"ae\u0301 b{STOP}ce\u0301 d{STOP}"
    example = characters.encode(Rendered(text, (text.index("c"), len(text))))
    tokens = characters.hf.convert_ids_to_tokens(example.tokens[example.loss_mask].tolist())
    assert tokens == ["c", "\u00e9", "\u2581", "d", STOP]


def test_padding_is_the_pad_token_or_else_the_end_or_else_zero(tmp_path: Path) -> None:
    padded = Tokenizer(tiny.save_tokenizer(tmp_path / "pad"))
    assert padded.vocabulary.pad_id == padded.hf.convert_tokens_to_ids("<|pad|>")
    ended = Tokenizer(tiny.save_tokenizer(tmp_path / "end", pad_token=None))
    assert ended.vocabulary.pad_id == ended.hf.convert_tokens_to_ids(STOP)
    assert Tokenizer(tiny.save_tokenizer(tmp_path / "none", pad_token=None, eos_token=None)).vocabulary.pad_id == 0


def test_control_tokens_are_all_special_ones_and_variables_the_named_ones(tokenizer: str) -> None:
    loaded = Tokenizer(tokenizer)
    assert loaded.control.findall("a".join(tiny.SPECIAL)) == list(tiny.SPECIAL)
    assert loaded.control.search("<|eot_i|>") is None
    assert loaded.vocabulary.variables == {"bos_token": BOM, "eos_token": STOP, "pad_token": "<|pad|>"}


def test_whatever_decides_the_tokens_of_a_pack_is_in_the_identity(tokenizer: str, tmp_path: Path) -> None:
    others = [
        Tokenizer(tokenizer),
        with_normalizer(tokenizer, tmp_path / "nfc", normalizers.NFC()),
        Tokenizer(tiny.save_tokenizer(tmp_path / "bos", bos_token="<|end_of_text|>")),
        Tokenizer(tiny.save_tokenizer(tmp_path / "pad", pad_token="<|eom_id|>")),
    ]
    assert len({other.vocabulary.sha256 for other in others}) == 4
    assert Tokenizer(tiny.save_tokenizer(tmp_path / "same")).vocabulary.sha256 == others[0].vocabulary.sha256


def test_a_tokenizer_that_is_not_there_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer '.*/none' cannot be loaded: .") as error:
        Tokenizer(str(tmp_path / "none"))
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_would_run_its_own_code_is_an_error(tokenizer: str, tmp_path: Path) -> None:
    directory = Path(edited(tokenizer, tmp_path / "code"))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"tokenizer '.*/code' cannot be loaded: .") as error:
        Tokenizer(str(directory))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def _metaspace(kind: str) -> PreTrainedTokenizerFast:
    """A small SentencePiece-like tokenizer: byte fallback and a normalizer (Llama 2), or Unigram with Metaspace."""
    texts = ["hello river seven assistant north window copper " * 5]
    if kind == "byte fallback":
        backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    else:
        backend = Backend(models.Unigram())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        special = ["<unk>"]
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
        backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte level", "byte fallback", "unigram"])
@pytest.mark.parametrize("sides", [{"rstrip": True}, {"lstrip": True}, {"lstrip": True, "rstrip": True}, {}])
def test_a_stop_that_absorbs_white_space_is_trained_on_every_kind_of_tokenizer(
    kind: str, sides: dict[str, bool]
) -> None:
    hf = tiny.fast_tokenizer() if kind == "byte level" else _metaspace(kind)
    stops = [AddedToken(text, special=True, normalized=False, **sides) for text in ("<|user|>", "<|end|>")]
    hf.add_tokens(stops, special_tokens=True)
    tokenizer = Tokenizer(hf)
    for answer in ("seven", "north \u00e9", "copper\n"):
        text = rendered(f"<|user|>\nhello<|end|>\n{answer}<|end|>\n\n<|user|> river<|end|>", f"{answer}<|end|>")
        example = tokenizer.encode(text)
        trained = hf.convert_ids_to_tokens(example.tokens[example.loss_mask].tolist())
        assert trained[-1] == "<|end|>"
        assert trained.count("<|end|>") == 1
        assert "<|user|>" not in trained
        assert example.notes == {}
        assert example.tokens.tolist() == tokenizer.ids(text.text)
        if kind == "byte level":
            kept = answer.rstrip() if sides.get("lstrip") else answer
            assert hf.decode(example.tokens[example.loss_mask]) == f"{kept}<|end|>"


def _lowering() -> PreTrainedTokenizerFast:
    backend = _metaspace("unigram").backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize(
    ("kind", "options", "answer", "reason"),
    [
        ("byte level", {"single_word": True}, "seven", "stop token read as words"),
        ("byte level", {"single_word": True}, "seven.", None),
        ("byte level", {"normalized": True}, "seven", None),
        ("unigram", {"single_word": True}, "seven", "stop token cut"),
        ("byte fallback", {"single_word": True}, "seven", "stop token read as words"),
        ("byte fallback", {"normalized": True}, "seven", "stop token read as words"),
        ("lowering", {"normalized": True}, "seven", None),
        ("lowering", {"normalized": True}, "seven <|end|> x", "special token typed"),
        ("lowering", {"normalized": False}, "seven <|end|> x", None),
    ],
)
def test_a_special_token_that_is_read_under_a_condition_is_trained_or_refused(
    kind: str, options: dict[str, bool], answer: str, reason: str | None
) -> None:
    others = {"byte level": tiny.fast_tokenizer, "lowering": _lowering}
    hf = others[kind]() if kind in others else _metaspace(kind)
    hf.add_tokens([AddedToken("<|END|>", special=True, **{"normalized": False, **options})], special_tokens=True)
    (example,) = Tokenizer(hf).encode_all([rendered(f"hello.<|END|>\n{answer}<|END|>\n", f"{answer}<|END|>")])
    if isinstance(example, Refused):
        assert example.reason == reason
    else:
        trained, stop = example.tokens[example.loss_mask].tolist(), hf.convert_tokens_to_ids("<|END|>")
        assert (reason, trained[-1], trained.count(stop)) == (None, stop, 1)


def test_white_space_absorbed_beside_a_typed_special_token_is_not_counted() -> None:
    hf = tiny.fast_tokenizer()
    hf.add_tokens([AddedToken("<|end|>", special=True, normalized=False, rstrip=True)], special_tokens=True)
    text = "say <|end|> \n<|end|>\nriver<|end|>\n"
    typed = Rendered(text, (text.index("river"), len(text) - 1), (Span(4, 11),))
    assert trained_text(Tokenizer(hf), typed) == "river<|end|>"


def test_a_special_token_that_reaches_over_a_turns_end_is_refused() -> None:
    hf = _metaspace("unigram")
    hf.add_tokens([AddedToken("<|end|>x", special=False, normalized=False)])
    hf.add_tokens([AddedToken("<|end|>", special=True, normalized=False)], special_tokens=True)
    text = rendered("hello seven<|end|>x", "seven<|end|>")
    with pytest.raises(Refused, match="stop token cut"):
        Tokenizer(hf).encode(text)


@pytest.mark.parametrize("kind", ["byte-level", "unigram", "byte fallback"])
def test_a_plain_stop_inside_a_longer_token_is_refused(tokenizer: str, kind: str) -> None:
    loaded = Tokenizer(tokenizer if kind == "byte-level" else _metaspace(kind))
    text = "hello seven hello seven"
    words = next(iter(sorted(loaded.hf.tokenize(text), key=len, reverse=True))).strip("\u2581\u0120")
    cut = rendered(text, text[: text.index(words) + len(words) - 1])
    assert loaded.encode(cut).notes == {"tokens across a span's border": 1}
    for stops, refused in (((words[-2],), True), (("?", words[:-1]), True), ((words[-1],), False), (("?",), False)):
        (result,) = loaded.encode_all([cut], stops)
        assert (isinstance(result, Refused) and result.reason == "stop token cut") == refused, stops
    with pytest.raises(
        Refused, match=r"stop token cut: a token holds the end of .* and text after the turn.*use a token"
    ):
        loaded.encode(cut, (words[-2],))
    whole = rendered(text, text[: text.index(words) + len(words)])
    assert isinstance(loaded.encode(whole, (words[-1],)), Example)
