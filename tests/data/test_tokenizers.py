import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mixerlab.data import DataError, load_tokenizer
from mixerlab.data.tokenizers import LONGEST_WORD, ByteTokenizer, JsonTokenizer, read_tokenizer, train_bpe

CORPUS = [
    "the cat sat on the mat\n" * 20,
    "def f(x):\n    return x + 1\n" * 20,
    "naïve café über straße 日本語 🙂 " * 9,
]
TOKENIZERS = {"bytes": ByteTokenizer(), "bpe": train_bpe(CORPUS, 400)}
TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    [*CORPUS, "a <|endoftext|> b", " \n\t  x"]
)

every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


@every_tokenizer
@given(TEXT)
def test_any_text_survives_encoding(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@every_tokenizer
def test_the_end_of_a_document_has_no_bytes_and_no_text(tokenizer):
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[tokenizer.eod_id] == 0
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eod_id]) == "a"


@every_tokenizer
def test_a_stream_of_tokens_ends_inside_a_character(tokenizer):
    ids = tokenizer.encode("€")
    assert len(ids) == 3
    assert [tokenizer.decode_bytes([i]) for i in ids] == [b"\xe2", b"\x82", b"\xac"]
    assert tokenizer.decode(ids[:2]) == "�"


@every_tokenizer
def test_a_batch_is_encoded_as_its_texts_are(tokenizer):
    assert [ids.tolist() for ids in tokenizer.encode_batch(CORPUS)] == [
        tokenizer.encode(text) for text in CORPUS
    ]


@every_tokenizer
def test_a_folder_is_all_that_loading_needs(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert loaded.pieces == tokenizer.pieces
    assert loaded.eod_id == tokenizer.eod_id
    text = "the café <|endoftext|>"
    assert loaded.encode(text) == tokenizer.encode(text)


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_training_twice_gives_the_same_tokens():
    first, second = (train_bpe(CORPUS, 400).tokenizer.to_str() for _ in range(2))
    assert first == second


def test_training_on_little_text_gives_fewer_tokens():
    assert train_bpe(["aaa aaa"], 400).vocab_size < 300


def test_words_without_end_are_trained_on_in_parts():
    # The work of training is proportional to the length of words: one of 60 MB would take hours.
    tokenizer = train_bpe(["x" * 100_000], 400)
    assert max(map(len, tokenizer.pieces)) == LONGEST_WORD
    loaded = json.loads(tokenizer.tokenizer.to_str())["pre_tokenizer"]
    assert loaded["type"] == "ByteLevel", "the file is one that every version of the library reads"


def test_training_on_ordinary_words_is_as_if_they_had_no_limit(monkeypatch):
    expected = train_bpe(CORPUS, 400).tokenizer.to_str()
    monkeypatch.setattr("mixerlab.data.tokenizers.LONGEST_WORD", 10**6)
    assert train_bpe(CORPUS, 400).tokenizer.to_str() == expected


def sentencepiece() -> Tokenizer:
    """In the way of Llama: ▁ for a space, and one in front of the text."""
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]
    model = models.BPE(
        {token: i for i, token in enumerate(tokens)},
        [("▁", "a"), ("a", "b")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


def wordpiece() -> Tokenizer:
    tokens = ["[UNK]", "[CLS]", "[SEP]", "play", "##ing", "."]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    return tokenizer


def read(tokenizer: Tokenizer, tmp_path, eod_token=None) -> JsonTokenizer:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return read_tokenizer(tmp_path / "tokenizer.json", eod_token)


def test_bytes_of_a_sentencepiece_vocabulary(tmp_path):
    tokenizer = read(sentencepiece(), tmp_path)
    assert tokenizer.eod_token == "</s>"
    text = "ab a\n€"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == b" " + text.encode()
    assert tokenizer.token_bytes[ids].sum() == 1 + len(text.encode())


def test_a_file_that_asks_for_truncation_padding_and_markers_gives_whole_plain_documents(tmp_path):
    tokenizer = read(wordpiece(), tmp_path)
    assert tokenizer.eod_token == "[SEP]"
    ids = tokenizer.encode("playing . play")
    assert [tokenizer.pieces[i] for i in ids] == [b" play", b"ing", b" .", b" play"]
    assert tokenizer.decode(ids) == "playing. play"


def test_added_tokens_that_are_text_keep_their_bytes(tmp_path):
    bpe = train_bpe(CORPUS, 400).tokenizer
    bpe.add_tokens([AddedToken("\n\n\n", normalized=False)])
    tokenizer = read(bpe, tmp_path)
    text = "a\n\n\nb"
    assert len(tokenizer.encode(text)) == 3
    assert tokenizer.decode_bytes(tokenizer.encode(text)) == text.encode()


def test_the_end_of_a_document_can_be_chosen(tmp_path):
    bpe = train_bpe(CORPUS, 400).tokenizer
    bpe.add_special_tokens(["<|im_end|>"])
    assert read(bpe, tmp_path).eod_token == "<|endoftext|>"
    tokenizer = read(bpe, tmp_path, "<|im_end|>")
    assert tokenizer.token_bytes[tokenizer.eod_id] == 0
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert loaded.eod_id == tokenizer.eod_id


def test_without_a_token_to_end_documents_the_message_says_which_there_are(tmp_path):
    tokenizer = sentencepiece()
    with pytest.raises(DataError, match=r"data.eod_token = '<end>': .* has no <end> .*<unk>, </s>"):
        read(tokenizer, tmp_path, "<end>")


@pytest.mark.parametrize("content", ["", "not json", json.dumps({"model": "gpt"})])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"data.tokenizer_file = .*tokenizer.json' is not a tokenizer.json"):
        read_tokenizer(path, None)


@pytest.mark.parametrize("wrong", [4_000_000_000, 1 << 22])
def test_ids_beyond_all_vocabularies_are_refused_before_they_ask_for_memory(tmp_path, wrong):
    file = json.loads(train_bpe(CORPUS, 400).tokenizer.to_str())
    file["model"]["vocab"]["x"] = wrong
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    message = (
        rf"data.tokenizer_file = .*: the token 'x' has the id {wrong}, beyond all vocabularies; .* 0 to \d+"
    )
    with pytest.raises(DataError, match=message) as error:
        read_tokenizer(tmp_path / "tokenizer.json", None)
    assert "\n" not in str(error.value)


def bpe_of_letters(**options) -> Tokenizer:
    """A BPE that has tokens for a and b alone."""
    tokenizer = Tokenizer(
        models.BPE({"a": 0, "b": 1, "ab": 2, **options.pop("more", {})}, [("a", "b")], **options)
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@pytest.mark.parametrize("more", [{}, {"</s>": 3}])
def test_text_that_a_tokenizer_would_leave_out_is_an_error(tmp_path, more):
    tokenizer = read(bpe_of_letters(more=more), tmp_path)
    assert tokenizer.encode("abab") == [2, 2]
    for text in ("ab€ab", "€", "ab</s>"):
        with pytest.raises(DataError, match=r"the tokenizer has no token for .* and none for the unknown"):
            tokenizer.encode_batch(["ab", text])
    tokenizer.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["model"]["unk_token"] is None, "the file is as it was"
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    with pytest.raises(DataError, match="no token for"):
        loaded.encode("€")


def test_the_text_that_has_no_token_is_named(tmp_path):
    with pytest.raises(DataError, match="no token for '€'"):
        read(bpe_of_letters(more={"</s>": 3}), tmp_path).encode("abba€")


@pytest.mark.parametrize(
    "model", [models.WordLevel({"a": 0}), models.WordPiece({"a": 0}), models.Unigram([("a", -1.0)])]
)
def test_a_library_that_cannot_encode_a_text_is_an_error(tmp_path, model):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    with pytest.raises(DataError, match="the tokenizer has no token for a part of the text"):
        read(tokenizer, tmp_path).encode("a x")


def test_a_tokenizer_with_an_unknown_token_says_that(tmp_path):
    tokenizer = read(bpe_of_letters(more={"<unk>": 3}, unk_token="<unk>"), tmp_path)
    assert tokenizer.encode("a€b") == [0, 3, 1]


def test_forking_after_tokenising_in_parallel_is_silent():
    code = (
        "import os; from mixerlab.data.tokenizers import train_bpe\n"
        "t = train_bpe(['a b c'] * 9, 300); t.encode_batch(['a b'] * 99)\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(0)\n"
        "os.waitpid(pid, 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b""),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"type": "json"}'),
        ("tokenizer_config.json", b'{"type": "json", "eod_token": "not there"}'),
        ("tokenizer_config.json", b"\xff"),
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\x80\x04."),
        ("tokenizer.json", None),
    ],
)
@pytest.mark.parametrize("has_checksums", [True, False])
def test_a_broken_tokenizer_is_named_in_one_line(tmp_path, name, content, has_checksums):
    TOKENIZERS["bpe"].save(tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == TOKENIZERS["bpe"].vocab_size
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    if not has_checksums:
        (tmp_path / "checksums.json").unlink()
    with pytest.raises(DataError, match=r"^[^\n]+$") as said:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(said.value)
