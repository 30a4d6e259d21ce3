"""Tokenizers of Hugging Face folders: files of every age give the vocabulary, transformers reads ours as it is."""

import json

import pytest
from hub import tokenizer_of
from transformers import AutoTokenizer

from cgpt.data.tokenizer import EOT, EOT_TEXT, gpt2, gpt2_letters, parse_tokenizer
from cgpt.errors import InputError
from cgpt.interchange.vocabulary import read_vocabulary, vocabulary_files

TEXTS = (
    "Call me Ishmael. Some years ago -- never mind how long",
    "  spaces\n\n\ttabs  1234567 don't we'll\r\n",
    "étrange 漢字 \u00a0\u2028 \U0001f40b and \x00\x7f bytes",
    "the <|endof text|> of whale16 ship3",
    "",
)


def write(folder, content):
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def gpt2_content():
    return json.loads(vocabulary_files(gpt2(), 1024)["tokenizer.json"])


@pytest.mark.parametrize("own", [False, True])
def test_transformers_encodes_as_we_do(tmp_path, own):
    tokenizer = tokenizer_of(300) if own else gpt2()
    for name, data in vocabulary_files(tokenizer, 64).items():
        (tmp_path / name).write_bytes(data)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert type(theirs).__name__.startswith("GPT2Tokenizer")
    assert len(theirs) == tokenizer.n_vocab
    assert theirs.model_max_length == 64
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (tokenizer.eot,) * 3
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode_ordinary(text)
    assert theirs(f"a{EOT_TEXT}b")["input_ids"] == [
        *tokenizer.encode_ordinary("a"),
        tokenizer.eot,
        *tokenizer.encode_ordinary("b"),
    ]
    assert theirs.decode(tokenizer.encode_ordinary(TEXTS[2])) == TEXTS[2]
    assert read_vocabulary(tmp_path, tokenizer.n_vocab).hash == tokenizer.hash
    theirs.save_pretrained(tmp_path / "again")
    if own:
        assert read_vocabulary(tmp_path / "again", tokenizer.n_vocab).hash == tokenizer.hash
    else:  # GPT-2's are what transformers itself writes
        for name, data in vocabulary_files(tokenizer, 64).items():
            theirs_too = json.loads((tmp_path / "again" / name).read_bytes())
            assert {**theirs_too, **json.loads(data)} == theirs_too


def test_gpt2s_own_is_the_built_in_one_whatever_the_age_of_the_file(tmp_path):
    assert read_vocabulary(tmp_path, 50257) is gpt2()  # no file at all
    content = gpt2_content()
    assert read_vocabulary(write(tmp_path, content), 50257) is gpt2()
    old = {**content, "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}}
    del old["pre_tokenizer"]["use_regex"]
    old["model"] = {
        "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
        "fuse_unk": False, "vocab": content["model"]["vocab"],
        "merges": [" ".join(pair) for pair in content["model"]["merges"]],
    }  # fmt: skip
    assert read_vocabulary(write(tmp_path, old), 50257) is gpt2()


def write_two(folder, version, ranks, merges):
    (folder / "vocab.json").write_text(json.dumps(ranks))
    (folder / "merges.txt").write_text(version + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return folder


def test_gpt2s_two_files_say_what_one_does(tmp_path):
    ranks, merges = gpt2_letters()
    assert read_vocabulary(write_two(tmp_path, "#version: 0.2\n", {**ranks, EOT_TEXT: EOT}, merges), 50257) is gpt2()


@pytest.mark.parametrize("version", ["#version: 0.2\n", ""])
def test_two_files_of_another(tmp_path, version):
    model = json.loads(tokenizer_of(300).file)["model"]
    ranks, merges = {**model["vocab"], EOT_TEXT: 299}, model["merges"]
    assert read_vocabulary(write_two(tmp_path, version, ranks, merges), 300).hash == tokenizer_of(300).hash
    write_two(tmp_path, version, ranks, merges[:-1])
    with pytest.raises(InputError, match=r"vocab.json: wanted the merges in id order as .*, got another build"):
        read_vocabulary(tmp_path, 300)
    write_two(tmp_path, version, model["vocab"], merges)
    with pytest.raises(InputError, match=r"vocab.json: wanted <\|endoftext\|> as"):
        read_vocabulary(tmp_path, 300)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"merges.txt: wanted UTF-8, got a damaged file"):
        read_vocabulary(tmp_path, 300)


def test_another_vocabulary_is_kept_in_a_form_that_a_run_can_hold(tmp_path):
    content = json.loads(tokenizer_of(300).file)
    content["model"]["vocab"][EOT_TEXT] = 299
    found = read_vocabulary(write(tmp_path, content), 300)
    assert found.hash == tokenizer_of(300).hash
    assert parse_tokenizer(found.file, "here").hash == found.hash
    assert read_vocabulary(tmp_path, 320).n_vocab == 300  # of a model with padding


def change(path, value):
    def apply(content):
        *way, last = path
        for key in way:
            content = content[key]
        content[last] = value

    return apply


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (change(["normalizer"], {"type": "NFC"}), "wanted the normalizer as"),
        (change(["pre_tokenizer", "add_prefix_space"], True), "wanted the pattern as"),
        (change(["pre_tokenizer"], {"type": "Whitespace"}), "damaged file|wanted the pattern as"),
        (change(["pre_tokenizer"], None), "damaged file"),
        (change(["model", "type"], "WordPiece"), "wanted the kind as"),
        (change(["model", "dropout"], 0.1), "wanted a BPE without dropout, got 0.1"),
        (change(["model", "byte_fallback"], True), "wanted a BPE without byte_fallback"),
        (change(["model", "ignore_merges"], True), "wanted a BPE without ignore_merges"),
        (change(["model", "end_of_word_suffix"], "</w>"), "wanted a BPE without end_of_word_suffix"),
        (change(["model", "merges"], ["a"]), "damaged file"),
        (change(["model", "merges"], None), "damaged file"),
        (change(["model", "vocab"], [["a", 0.0]]), "damaged file"),
        (change(["model", "vocab", "!"], 5), "wanted the ids as"),
        (change(["model", "vocab", "!"], "0"), "damaged file"),
        (change(["added_tokens", 0, "content"], "</s>"), "<|endoftext|>|damaged file"),
        (change(["added_tokens", 0, "id"], 5), r"wanted <\|endoftext\|> as"),
        (change(["added_tokens"], []), "damaged file"),
        (change(["added_tokens"], 3), "damaged file"),
    ],
)
def test_another_build_is_refused(tmp_path, apply, message):
    content = json.loads(tokenizer_of(300).file)
    apply(content)
    with pytest.raises(InputError, match=message) as error:
        read_vocabulary(write(tmp_path, content), 300)
    assert str(tmp_path / "tokenizer.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_sizes_that_do_not_go_together(tmp_path):
    with pytest.raises(InputError, match=r"wanted tokenizer.json, or vocab.json and merges.txt, .* a model of 300"):
        read_vocabulary(tmp_path, 300)
    write(tmp_path, json.loads(tokenizer_of(300).file))
    with pytest.raises(InputError, match="wanted at most the model's 299 ids, got 300"):
        read_vocabulary(tmp_path, 299)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer.json: wanted JSON, got a damaged file"):
        read_vocabulary(tmp_path, 300)


def test_ids_of_padding_have_no_text_but_are_shown():
    tokenizer = tokenizer_of(300)
    ids = tokenizer.encode_ordinary("sea")
    assert tokenizer.decode([*ids, 300, 511]) == "sea\ufffd\ufffd"
    assert "".join(tokenizer.stream([*ids, 300])) == "sea\ufffd"
