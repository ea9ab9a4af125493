"""A tokenizer of one's own: trained, and read by what trains models."""

import json

import numpy as np
import pytest

from scaling.data.chat import open_chat_data
from scaling.data.tokenizer import open_tokenizer
from scaling.errors import UserError
from scaling.spec.sections import ChatData
from scaling.tokenizer import SPECIAL, main


def test_it_spells_everything_and_knows_the_template(tmp_path, capsys):
    text, chat, out = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "tokenizer.json"
    text.write_text("the theme of the thesis is there " * 50)
    records = [{"instruction": "the theme?", "response": "the thesis"}, {"text": "there is the theme"}]
    chat.write_text("\n".join(json.dumps(record) for record in records))
    main([str(text), str(chat), "--vocab-size", "300", "--out", str(out)])
    said = capsys.readouterr()
    tokenizer = open_tokenizer(str(out), 300)
    assert f"{tokenizer.vocabulary:,} tokens, of 2 files" in said.out and tokenizer.vocabulary <= 300
    assert tokenizer.end == 0, "the first special token ends a text"
    (ids,) = tokenizer.pieces(["the theme"])
    assert len(ids) < 9, "nothing was merged"

    import tokenizers

    inner = tokenizers.Tokenizer.from_file(str(out))
    strange = "ünïcödé 漢字 \t\x00 🙂"
    assert inner.decode(inner.encode(strange).ids) == strange
    assert [inner.token_to_id(token) for token in SPECIAL] == [0, 1, 2]

    chat.write_text(json.dumps(records[0]))
    data = ChatData(
        kind="chat", train=[str(chat)], validation=0, tokenizer=str(out), sequence_length=64, cache=str(tmp_path / "c")
    )
    inputs = open_chat_data(data, 300, spoken_only=True)[0].read(np.array([0])).inputs[0].tolist()
    assert inputs[0] == 1 and 2 in inputs, "<|im_start|> and <|im_end|> are tokens of their own"


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(UserError, match=r"`--vocab-size` must be at least 259 .* but is 100"):
        main(["x", "--vocab-size", "100", "--out", "y"])
    with pytest.raises(UserError, match=r"`FILES` must match files"):
        main([str(tmp_path / "none"), "--vocab-size", "300", "--out", "y"])
    (tmp_path / "bad.jsonl").write_text('{"txt": 1}\n')
    with pytest.raises(UserError, match=r"bad.jsonl:1: the line must have"):
        main([str(tmp_path / "bad.jsonl"), "--vocab-size", "300", "--out", str(tmp_path / "t.json")])
