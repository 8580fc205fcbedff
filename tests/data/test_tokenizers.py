import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mixerlab.data import DataError, load_tokenizer
from mixerlab.data.tokenizers import ByteTokenizer, JsonTokenizer, read_tokenizer, train_bpe

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
