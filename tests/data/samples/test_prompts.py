"""Prompts for generation: from words, from a file, and as token ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lsh.data.samples.prompts import prompt_ids, read_prompts
from megatron_lsh.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Llama2Tokenizer
from megatron_lsh.errors import ConfigError


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes("\ufeffa\u2028b\x0cc\r\n\n \x85d".encode())
    assert read_prompts(["first"], tmp_path / "p") == ["first", "a\u2028b\x0cc", "", " \x85d"]


def test_what_is_no_prompt(tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(b"a\n\xff\n")
    (tmp_path / "empty").write_bytes(b"")
    for given_, name, message in (
        ([], None, r"--prompt .absent. must be given"),
        ([], "empty", r"--prompt .absent. must be given"),
        ([], "gone", r"--prompt-file .*gone. must be a readable file \(No such file"),
        ([], ".", r"must be a readable file \(Is a directory"),
        ([], "p", r"--prompt-file .*p., line 2 must be UTF-8"),
        (["a", "b\udcff"], None, r"--prompt: text 2 .*b.udcff.* must be UTF-8"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_prompts(given_, tmp_path / name if name else None)


@settings(deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("prompts") / "p"
    file.write_bytes(content)
    try:
        texts = read_prompts([], file)
    except ConfigError as error:
        assert "line" in str(error) or not content.strip(b"\xef\xbb\xbf")
    else:
        assert all("\n" not in text for text in texts)
        assert "\n".join(texts) == content.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").removesuffix(
            "\r"
        )


def test_what_a_tokenizer_puts_behind_a_text_does_not_end_a_prompt(tmp_path: Path, huggingface_folder: Path) -> None:
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_file(str(huggingface_folder / "tokenizer.json"))
    backend.add_special_tokens(["[CLS]", "[SEP]"])
    marks = [("<|endoftext|>", 299), ("[CLS]", 300), ("[SEP]", 301)]
    bare = HuggingFaceTokenizer(str(huggingface_folder)).tokenize("x = 1")
    for number, (template, before, empty) in enumerate(
        (
            ("$A <|endoftext|>", [], [299]),
            ("[CLS] $A [SEP]", [300], [300]),
            ("<|endoftext|> $A [SEP] <|endoftext|>", [299], [299]),
        )
    ):
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
        backend.save(str(tmp_path / f"{number}.json"))
        tokenizer = HuggingFaceTokenizer(str(tmp_path / f"{number}.json"))
        assert prompt_ids(tokenizer, "x = 1") == [*before, *bare]
        assert prompt_ids(tokenizer, "") == empty
        assert prompt_ids(tokenizer, "x = 1<|endoftext|>") == [*before, *bare, 299]  # the text says so


def test_prompts_of_other_tokenizers(sentencepiece_model: Path) -> None:
    llama = Llama2Tokenizer(str(sentencepiece_model))
    assert prompt_ids(llama, "x") == llama.tokenize("x") and prompt_ids(llama, "") == [llama.bos]
    assert prompt_ids(ByteTokenizer(), "ab") == [97, 98] and prompt_ids(ByteTokenizer(), "") == [256]
