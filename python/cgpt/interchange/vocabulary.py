"""Tokenizers of Hugging Face folders, in and out: GPT-2's own and others of its build.

    in    tokenizer.json, or vocab.json and merges.txt  ->  a Tokenizer, GPT-2's where it says the same
    out   tokenizer.json, tokenizer_config.json         what save_pretrained writes for a GPT2Tokenizer

Files of all ages differ where they say the same: merges as "a b" or ["a", "b"], the end of text in the vocabulary or
beside it, options left out that have the usual value. All are put in the form that data/tokenizer.py reads and judges.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cgpt.data.tokenizer import EOT, EOT_TEXT, TOKENIZER, VOCAB_SIZE, Tokenizer, gpt2, gpt2_letters, parse_tokenizer
from cgpt.errors import InputError
from cgpt.interchange.files import read_json
from cgpt.tensor_files import open_regular

MODEL = {  # a BPE's options, as the merges alone are to decide
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
DECIDING = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

NO_POST_PROCESSOR = {  # how GPT2Tokenizer says that it adds nothing
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


def read_vocabulary(folder: Path, n_vocab: int) -> Tokenizer:
    """The tokenizer of a Hugging Face folder whose model has `n_vocab` rows, some of which may be padding.

    A folder without one is GPT-2's where the size is. Raises InputError for a damaged one, one of another build than
    GPT-2's (byte-level BPE, its pattern, <|endoftext|> last), and one of more ids than the model has.
    """
    where = folder / TOKENIZER
    if where.exists():
        content = read_json(where)
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        where = folder / "vocab.json"
        content = _of_two_files(read_json(where), folder / "merges.txt")
    elif n_vocab == VOCAB_SIZE:
        return gpt2()
    else:
        wanted = f"wanted {TOKENIZER}, or vocab.json and merges.txt, for a vocabulary that is not GPT-2's {VOCAB_SIZE}"
        raise InputError(f"{folder}: {wanted}, got neither beside a model of {n_vocab}")
    found = _tokenizer(content, where)
    if found.n_vocab > n_vocab:
        raise InputError(f"{where}: wanted at most the model's {n_vocab} ids, got {found.n_vocab}")
    return found


def vocabulary_files(tokenizer: Tokenizer, seq_len: int) -> dict[str, bytes]:
    """File name -> content, of the tokenizer files that a Hugging Face folder has beside a model of `seq_len`."""
    settings = {
        "add_prefix_space": False,
        "backend": "tokenizers",
        "bos_token": EOT_TEXT,
        "eos_token": EOT_TEXT,
        "errors": "replace",
        "model_max_length": seq_len,
        "pad_token": None,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": EOT_TEXT,
    }
    return {TOKENIZER: tokenizer.file or _json(_gpt2_content()), "tokenizer_config.json": _json(settings) + b"\n"}


def _tokenizer(content: dict, where: Path) -> Tokenizer:
    found = parse_tokenizer(_json(_usual(content, where)), str(where))
    return gpt2() if found.hash == gpt2().hash else found


def _usual(content: dict, where: Path) -> dict[str, Any]:
    """`content` as `vocabulary.learn` writes it, as far as it says the same."""
    try:
        model, level = content["model"], content["pre_tokenizer"]
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        vocabulary = {token: rank for token, rank in model["vocab"].items() if token not in added}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        odd = [name for name in DECIDING if model.get(name)]
        level = {**level, "use_regex": level.get("use_regex", True)}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: wanted a byte-level BPE vocabulary, got a damaged file ({error!r})") from error
    if odd:
        raise InputError(f"{where}: wanted a BPE without {odd[0]}, got {model[odd[0]]!r}")
    whole = _whole(content["added_tokens"], vocabulary, merges)
    whole["model"]["type"] = model.get("type", "BPE")
    return whole | {"normalizer": content.get("normalizer"), "pre_tokenizer": level}


def _gpt2_content() -> dict[str, Any]:
    """GPT-2's own: its vocabulary.json has the end of text in it."""
    vocabulary, merges = gpt2_letters()
    found = _whole([_end(EOT)], vocabulary | {EOT_TEXT: EOT}, merges)
    found["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    return found | {"post_processor": NO_POST_PROCESSOR}


def _whole(added: list[dict], vocabulary: dict[str, int], merges: list) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": LEVEL,
        "post_processor": None,
        "decoder": {**LEVEL, "add_prefix_space": True},
        "model": {"type": "BPE", **MODEL, "vocab": vocabulary, "merges": merges},
    }


def _of_two_files(vocabulary: dict, merges: Path) -> dict[str, Any]:
    """The content of a tokenizer.json that says what vocab.json and merges.txt do."""
    with open_regular(merges) as file:
        try:
            lines = file.read().decode().split("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"{merges}: wanted UTF-8, got a damaged file ({error})") from error
    lines = [line for line in lines[lines[0].startswith("#version") :] if line.strip()]
    return {
        "added_tokens": [_end(vocabulary.get(EOT_TEXT))],
        "pre_tokenizer": LEVEL,
        "model": {"vocab": vocabulary, "merges": lines},
    }


def _end(rank: object) -> dict[str, Any]:
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": rank, "content": EOT_TEXT, **options, "special": True}


def _json(content: dict) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode()
